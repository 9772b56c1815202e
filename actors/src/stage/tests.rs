//! The core of a stage, message by message.

use super::*;
use crate::testing::{Asked, bits, drive, materials, message, replace, table, weights};
use crate::worker::Materials;
use everstep_kernels::CpuBackend;

/// Stage 0, or 1, which is the last.
fn stage(materials: &Materials, stage: u32) -> StageCore {
    let corpus = materials.corpus.clone();
    let mut core = StageCore::new(Arc::clone(&materials.spec), Arc::clone(&materials.layout), corpus, 0, stage);
    drive(&mut core, Event::Table(Arc::new(table(materials))));
    core
}

fn begin(materials: &Materials, core: &mut StageCore) -> Asked {
    let mut all = Asked::default();
    for group in materials.spec.groups_of_stage(core.stage) {
        let asked = drive(core, weights(materials, group));
        all.sent.extend(asked.sent);
        all.jobs += asked.jobs;
    }
    all
}

fn hidden(micro_batch: u32) -> Event {
    let turn = Turn { step: 1, lane: 0, micro_batch };
    let rows = Tensor::from_vec(4, 4, (0..16).map(|i| (i + micro_batch) as f32 * 0.1).collect());
    message(ActorId::Stage { lane: 0, stage: 0 }, Body::Hidden { turn, rows })
}

/// What the others answer: an expert its rows, the next stage its input as the gradient.
fn answer(to: ActorId, body: &Body<Tensor>) -> Option<Event> {
    match body {
        Body::Rows { turn, pass, rows } => {
            Some(message(to, Body::Answer { turn: *turn, pass: *pass, rows: rows.clone() }))
        }
        Body::Hidden { turn, rows } => Some(message(to, Body::Gradient { turn: *turn, rows: rows.clone() })),
        _ => None,
    }
}

/// Answers what is sent until the stage asks no more. Gives all that it sent, and how many jobs it had.
fn serve(core: &mut StageCore, first: Asked) -> Asked {
    let mut all = Asked { jobs: first.jobs, ..Asked::default() };
    let mut queue = std::collections::VecDeque::from(first.sent);
    while let Some((to, body)) = queue.pop_front() {
        if let Some(event) = answer(to, &body) {
            let asked = drive(core, event);
            all.jobs += asked.jobs;
            queue.extend(asked.sent);
        }
        all.sent.push((to, body));
    }
    all
}

fn whole_step(materials: &Materials) -> Vec<(ActorId, Body<Tensor>)> {
    let mut core = stage(materials, 1);
    begin(materials, &mut core);
    let mut sent = Vec::new();
    for micro_batch in 0..2 {
        let asked = drive(&mut core, hidden(micro_batch));
        sent.extend(serve(&mut core, asked).sent);
    }
    assert!(core.describe().contains("waits for the commit"), "{}", core.describe());
    sent
}

/// ST-1: nothing starts before its input; operations start in program order.
#[test]
fn operations_wait_for_their_inputs_in_order() {
    let materials = materials();
    let mut core = stage(&materials, 1);
    assert_eq!(begin(&materials, &mut core).jobs, 0);
    // The second micro-batch's input is there, but the first's forward comes first.
    assert_eq!(drive(&mut core, hidden(1)).jobs, 0);
    let asked = drive(&mut core, hidden(0));
    assert_eq!(asked.jobs, 1);
    assert!(asked.sent.iter().all(|(to, body)| {
        matches!(to, ActorId::Expert { layer: 2, .. })
            && matches!(body, Body::Rows { turn, .. } if turn.micro_batch == 0)
    }));
    assert_eq!(asked.sent.len(), 3, "every expert of the layer hears of the micro-batch");
}

/// ST-2: copies of messages change nothing, early or late.
#[test]
fn second_copies_change_nothing() {
    let materials = materials();
    let expected = bits(&whole_step(&materials));
    let mut core = stage(&materials, 1);
    begin(&materials, &mut core);
    let mut sent = Vec::new();
    for micro_batch in 0..2 {
        let asked = drive(&mut core, hidden(micro_batch));
        assert_eq!(drive(&mut core, hidden(micro_batch)).sent.len(), 0);
        sent.extend(serve(&mut core, asked).sent);
        assert_eq!(drive(&mut core, hidden(0)).sent.len(), 0);
    }
    assert_eq!(bits(&sent), expected);
}

/// ST-3: a new life sends the same bits; its receivers' new lives get all that is kept.
#[test]
fn a_new_life_sends_the_same_messages_and_kept_ones_go_again() {
    let materials = materials();
    assert_eq!(bits(&whole_step(&materials)), bits(&whole_step(&materials)));
    let mut core = stage(&materials, 1);
    begin(&materials, &mut core);
    let asked = drive(&mut core, hidden(0));
    let expert = ActorId::Expert { layer: 2, expert: 1 };
    let mine: Vec<_> = asked.sent.iter().filter(|(to, _)| *to == expert).cloned().collect();
    let again = drive(&mut core, Event::Table(Arc::new(replace(&table(&materials), expert))));
    assert_eq!(bits(&again.sent), bits(&mine));
    // OB-1: a job makes them, and nothing for experts that live.
    assert_eq!((again.jobs, mine.len()), (1, 1));
    let sums = drive(&mut core, Event::Table(Arc::new(table(&materials))));
    assert_eq!(bits(&sums.sent), bits(&mine), "yet another life");
}

/// AD-3: an audited expert gets the very rows that its life before had, not what would be made again.
#[test]
fn an_audited_expert_gets_copies() {
    let audited = JobSpec { audit: 1, ..(*materials().spec).clone() };
    let materials = crate::testing::of(audited);
    let mut core = stage(&materials, 1);
    begin(&materials, &mut core);
    core.flip();
    let asked = drive(&mut core, hidden(0));
    let expert = ActorId::Expert { layer: 2, expert: 1 };
    let mine: Vec<_> = asked.sent.iter().filter(|(to, _)| *to == expert).cloned().collect();
    let again = drive(&mut core, Event::Table(Arc::new(replace(&table(&materials), expert))));
    assert_eq!((mine.len(), again.jobs, bits(&again.sent)), (1, 0, bits(&mine)));
}

/// ST-5: one job more for each wait of a backward function, and sums of everything at the end.
#[test]
fn weight_products_fill_the_waits_of_the_first_stage() {
    let materials = materials();
    let mut core = stage(&materials, 0);
    let first = begin(&materials, &mut core);
    let all = serve(&mut core, first);
    let wait = |(to, body): &(ActorId, Body<Tensor>)| match (to, body) {
        (ActorId::Expert { layer, .. }, Body::Rows { turn, pass, .. }) => {
            Some((turn.micro_batch, *pass == Pass::Backward, *layer))
        }
        _ => None,
    };
    let waits: std::collections::BTreeSet<_> = all.sent.iter().filter_map(wait).collect();
    let sums = all.sent.iter().filter(|(_, body)| matches!(body, Body::Sums { .. })).count();
    let backward = waits.iter().filter(|(_, backward, _)| *backward).count();
    assert!(backward > 0 && 2 * backward == waits.len(), "{waits:?}");
    // Two micro-batches of three operations, each resumed after its waits.
    assert_eq!(all.jobs, 2 * 3 + waits.len() + backward);
    assert_eq!(sums, materials.spec.groups_of_stage(0).len() * 2, "both copies of each shard");
}

/// ST-5: answers that come while the products are made wait for them, copies too; and where the step's commit comes
/// first, the next step begins and the job's outcome is nobody's.
#[test]
fn answers_and_commits_may_come_before_the_products_are_made() {
    let materials = materials();
    for committed in [false, true] {
        let mut core = stage(&materials, 0);
        let mut events: std::collections::VecDeque<Event> =
            materials.spec.groups_of_stage(0).iter().map(|group| weights(&materials, *group)).collect();
        // Up to the first job of weight products, which is kept.
        let (mut kept, mut late) = (None, Vec::new());
        while let Some(event) = events.pop_front() {
            for effect in core.on(event) {
                match effect {
                    Effect::Compute { job, .. } => {
                        let so_far = matches!(&job, Job::Stage { operation: StageOperation::WeightSoFar { .. }, .. });
                        if so_far {
                            kept = Some(job);
                        } else {
                            events.push_back(Event::Computed(crate::compute::run(job, &CpuBackend::FP32)));
                        }
                    }
                    Effect::Send { to, body, .. } => {
                        let back = matches!(&body, Body::Rows { pass: Pass::Backward, .. });
                        if let Some(event) = answer(to, &body) {
                            if back { late.push(event) } else { events.push_back(event) }
                        }
                    }
                    Effect::Tell { .. } => {}
                }
            }
        }
        let job = kept.expect("the first stage waits in its backward function");
        assert!(!late.is_empty());
        if committed {
            for group in materials.spec.groups_of_stage(0) {
                let Event::Message { from, body: Body::Weights { group, tensors, .. } } = weights(&materials, group)
                else {
                    unreachable!("weights are a message")
                };
                core.on(Event::Message { from, body: Body::Weights { step: 1, group, tensors } });
            }
            assert!(core.describe().starts_with("step 2,"), "{}", core.describe());
        }
        for event in late {
            if let Event::Message { from, body } = &event {
                let copy = Event::Message { from: *from, body: body.clone() };
                assert!(core.on(copy).is_empty());
            }
            assert!(core.on(event).is_empty(), "the model is in a job");
        }
        let before = core.describe();
        let effects = core.on(Event::Computed(crate::compute::run(job, &CpuBackend::FP32)));
        if committed {
            assert!(effects.is_empty() && core.describe() == before, "an outcome of the step before");
        } else {
            let resumed = |e: &Effect| {
                matches!(e, Effect::Compute { job: Job::Stage { operation: StageOperation::Resume { .. }, .. }, .. })
            };
            assert!(effects.len() == 1 && resumed(&effects[0]), "all answers are there");
        }
    }
}

/// ST-4: sums go to every copy of their shards; the next weights end the step.
#[test]
fn sums_leave_at_the_end_and_weights_begin_the_next_step() {
    let materials = materials();
    let sent = whole_step(&materials);
    let sums: Vec<_> = sent.iter().filter(|(_, body)| matches!(body, Body::Sums { .. })).collect();
    assert_eq!(sums.len(), materials.spec.groups_of_stage(1).len() * 2);
    for (to, body) in sums {
        let Body::Sums { micro_batches, samples, losses, group, .. } = body else { unreachable!() };
        assert!(matches!(to, ActorId::Reducer { .. }));
        assert_eq!((*micro_batches, *samples), (2, 2));
        let head = *group as usize + 1 == materials.layout.all_groups.len();
        assert_eq!(losses[0] > 0.0, head);
    }
}
