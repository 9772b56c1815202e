//! The reducer's promises, one by one.

use super::*;
use crate::testing::{Asked, address, bits, drive, materials, message, of, replace, table};
use crate::worker::Materials;
use everstep_kernels::Bf16;

fn reducer(materials: &Materials, replica: u32) -> ReducerCore {
    ReducerCore::new(Arc::clone(&materials.spec), Arc::clone(&materials.layout), 0, replica)
}

/// A primary with the initial state of shard 0.
fn primary(materials: &Materials) -> ReducerCore {
    let mut core = reducer(materials, 0);
    let mut first = table(materials);
    first.primaries = vec![None; 2];
    drive(&mut core, Event::Table(Arc::new(first)));
    let mut second = table(materials);
    second.epoch = 2;
    drive(&mut core, Event::Table(Arc::new(second)));
    core
}

/// Everything that is sent to shard 0 in a step, with values that depend on sender and parameter.
fn sums(materials: &Materials, step: Step) -> Vec<(ActorId, Body<Tensor>)> {
    let spec = &materials.spec;
    let mut out = Vec::new();
    for group in &materials.layout.groups[0] {
        for (n, sender) in spec.senders_of(*group).into_iter().enumerate() {
            let value = |i: usize, p: u32| ((i + 1) as f32 * 0.37 + p as f32) / (n as f32 + 1.7) - 1.0;
            let gradients = materials.layout.of_group[group]
                .iter()
                .filter(|p| materials.layout.has_gradient(**p))
                .map(|p| {
                    let shape = &materials.layout.parameters[*p as usize];
                    let data = (0..shape.len()).map(|i| value(i, *p)).collect();
                    Tensor::from_vec(shape.rows, shape.columns, data)
                })
                .collect();
            let lanes = if matches!(group, Group::Expert { .. }) { spec.lanes } else { 1 };
            let body = Body::Sums {
                step,
                group: materials.layout.number_of[group],
                micro_batches: spec.micro_batches.at(step),
                samples: u64::from(lanes) * spec.sequences_of_lane(step),
                gradients,
                loads: if matches!(group, Group::Layer(1 | 2)) { vec![1, 2, 3] } else { Vec::new() },
                losses: [0.5, 0.0],
            };
            out.push((sender, body));
        }
    }
    out
}

fn commit(step: Step) -> Event {
    let body = Body::Commit(Commit { step, clip: 0.5, lr: 0.01, skipped: false });
    message(ActorId::Supervisor, body)
}

fn give(core: &mut ReducerCore, all: &[(ActorId, Body<Tensor>)]) -> Asked {
    let mut out = Asked::default();
    for (from, body) in all {
        out.sent.extend(drive(core, message(*from, body.clone())).sent);
    }
    out
}

fn prepared(asked: &Asked) -> usize {
    asked.sent.iter().filter(|(_, b)| matches!(b, Body::Prepared { .. })).count()
}

/// Messages with the bits of their tensors.
type Sent = Vec<(ActorId, Body<Vec<u32>>)>;

fn state(core: &mut ReducerCore) -> (Step, Sent) {
    let mirror = ActorId::Reducer { shard: 0, replica: 1 };
    let asked = drive(core, message(mirror, Body::Fetch { step: 0 }));
    let Body::State { step, .. } = &asked.sent[0].1 else { panic!("{asked:?}") };
    (*step, bits(&asked.sent))
}

/// RE-1: prepared once, when the last sum is there; second copies and foreign sums are not counted.
#[test]
fn a_step_is_prepared_when_every_sum_is_there_once() {
    let materials = materials();
    let mut core = primary(&materials);
    let all = sums(&materials, 1);
    assert_eq!(prepared(&give(&mut core, &all[1..])), 0);
    assert_eq!(prepared(&give(&mut core, &all[1..])), 0, "second copies don't stand for the one that is missing");
    let stranger = ActorId::Stage { lane: 9, stage: 0 };
    assert_eq!(prepared(&give(&mut core, &[(stranger, all[0].1.clone())])), 0);
    let asked = give(&mut core, &all[..1]);
    assert_eq!(prepared(&asked), 1);
    let Body::Prepared { samples, .. } = &asked.sent[0].1 else { panic!("{asked:?}") };
    assert_eq!(*samples, 4);
}

/// RE-1: what is reported tells sums apart that have one norm; a shard without another copy is not hashed.
#[test]
fn a_flipped_sign_shows_in_the_digest_alone() {
    let materials = materials();
    let report = |materials: &Materials, all: &[(ActorId, Body<Tensor>)]| {
        let asked = give(&mut primary(materials), all);
        let prepared = asked.sent.into_iter().find_map(|(_, body)| match body {
            Body::Prepared { norm, digest, .. } => Some((norm, digest)),
            _ => None,
        });
        prepared.expect("all sums are there")
    };
    let all = sums(&materials, 1);
    let (norm, digest) = report(&materials, &all);
    assert_eq!(report(&materials, &all), (norm.clone(), digest));
    // An expert has one sum: its sign is the result's.
    let mut other = all.clone();
    let expert = other.iter_mut().find(|(from, _)| matches!(from, ActorId::Expert { .. })).expect("an expert");
    let Body::Sums { gradients, .. } = &mut expert.1 else { unreachable!("sums are sums") };
    let (rows, columns) = (gradients[0].rows(), gradients[0].columns());
    let mut data = gradients[0].as_host().expect("on the host").to_vec();
    data[1] = -data[1];
    gradients[0] = Tensor::from_vec(rows, columns, data);
    let (same, differs) = report(&materials, &other);
    assert!(same == norm && digest.is_some() && differs != digest);
    let alone = of(JobSpec { mirrors: 0, ..(*materials.spec).clone() });
    assert_eq!(report(&alone, &sums(&alone, 1)).1, None);
}

/// RE-2: the order of arrival does not show.
#[test]
fn lanes_are_added_in_one_order() {
    let mut spec = (*materials().spec).clone();
    spec.lanes = 3;
    let materials = of(spec);
    let run = |reverse: bool| {
        let mut core = primary(&materials);
        let mut all = sums(&materials, 1);
        if reverse {
            all.reverse();
        }
        give(&mut core, &all);
        drive(&mut core, commit(1));
        state(&mut core)
    };
    assert_eq!(run(false).0, 1);
    assert_eq!(run(false), run(true));
}

/// RE-3: a state changes by the commit of the next step alone.
#[test]
fn a_state_changes_by_the_next_commit_alone() {
    let materials = materials();
    let mut core = primary(&materials);
    let before = state(&mut core);
    assert_eq!(before.0, 0);
    give(&mut core, &sums(&materials, 1));
    assert_eq!(state(&mut core), before);
    drive(&mut core, commit(1));
    let after = state(&mut core);
    assert_eq!(after.0, 1);
    assert_ne!(after.1, before.1);
    drive(&mut core, commit(1));
    give(&mut core, &sums(&materials, 1));
    assert_eq!(state(&mut core), after, "a repeated commit changes nothing");
}

/// RE-4: a new copy asks the primary, keeps sums meanwhile, and catches up with them.
#[test]
fn a_new_copy_catches_up() {
    let materials = materials();
    let mut first = primary(&materials);
    let mut copy = reducer(&materials, 1);
    let asked = drive(&mut copy, Event::Table(Arc::new(table(&materials))));
    let to_primary = |(to, b): &(ActorId, Body<Tensor>)| {
        *to == ActorId::Reducer { shard: 0, replica: 0 } && matches!(b, Body::Fetch { .. })
    };
    assert!(asked.sent.iter().any(to_primary), "{asked:?}");
    let answer = drive(&mut first, message(ActorId::Reducer { shard: 0, replica: 1 }, Body::Fetch { step: 0 })).sent;
    let all = sums(&materials, 1);
    give(&mut first, &all);
    drive(&mut first, commit(1));
    // Sums and commit come before the state does.
    give(&mut copy, &all);
    drive(&mut copy, commit(1));
    drive(&mut copy, message(ActorId::Reducer { shard: 0, replica: 0 }, answer[0].1.clone()));
    assert_eq!(state(&mut copy), state(&mut first));
    // A step of which it misses a sum: it says so and asks again.
    let all = sums(&materials, 2);
    give(&mut copy, &all[1..]);
    let asked = drive(&mut copy, commit(2));
    assert!(asked.sent.iter().any(to_primary) && asked.sent.iter().any(|(_, b)| matches!(b, Body::Stateless)));
}

/// RE-4: a state that is long on its way is asked for once, whatever is committed meanwhile, and the sums of a few steps are
/// kept; who asks in the middle of a commit gets the state that it makes.
#[test]
fn a_state_is_sent_once() {
    let materials = materials();
    let (mut first, mut copy) = (primary(&materials), reducer(&materials, 1));
    let me = ActorId::Reducer { shard: 0, replica: 1 };
    let mut fetches = drive(&mut copy, Event::Table(Arc::new(table(&materials)))).sent;
    // The primary is about to apply a commit.
    give(&mut first, &sums(&materials, 1));
    let applying = first.on(commit(1));
    assert!(drive(&mut first, message(me, Body::Fetch { step: 0 })).sent.is_empty());
    let [Effect::Compute { job, .. }] = <[Effect; 1]>::try_from(applying).expect("one job") else { panic!("a job") };
    let outcome = crate::compute::run(job, &everstep_kernels::CpuBackend::FP32);
    let sent = drive(&mut first, Event::Computed(outcome)).sent;
    let states: Vec<_> = sent.into_iter().filter(|(_, b)| matches!(b, Body::State { .. })).collect();
    let [(to, answer)] = &states[..] else { panic!("{states:?}") };
    assert!(*to == me && matches!(answer, Body::State { step: 1, .. }));
    let last = LEDGERS_MAX as Step + 1;
    for step in 2..=last {
        let all = sums(&materials, step);
        for core in [&mut first, &mut copy] {
            give(core, &all);
        }
        fetches.extend(drive(&mut copy, commit(step)).sent);
        drive(&mut first, commit(step));
    }
    let asked = fetches.iter().filter(|(_, b)| matches!(b, Body::Fetch { .. })).count();
    assert_eq!(asked, 1, "{fetches:?}");
    drive(&mut copy, message(ActorId::Reducer { shard: 0, replica: 0 }, answer.clone()));
    assert_eq!(state(&mut copy).0, last);
    assert_eq!(state(&mut copy), state(&mut first));
    // One step more than are kept: it has to ask again.
    let mut late = reducer(&materials, 1);
    drive(&mut late, Event::Table(Arc::new(table(&materials))));
    for step in 2..=last + 1 {
        give(&mut late, &sums(&materials, step));
        drive(&mut late, commit(step));
    }
    assert_eq!(late.ledgers.len(), LEDGERS_MAX);
    let asked = drive(&mut late, message(ActorId::Reducer { shard: 0, replica: 0 }, answer.clone()));
    assert!(asked.sent.iter().any(|(_, b)| matches!(b, Body::Fetch { .. })), "{asked:?}");
}

/// RE-5: weights go to every user once, and again to a new life alone.
#[test]
fn weights_go_to_users_and_to_their_new_lives() {
    let materials = materials();
    let mut core = primary(&materials);
    give(&mut core, &sums(&materials, 1));
    let handed = |asked: &Asked| -> Vec<ActorId> {
        asked.sent.iter().filter(|(_, b)| matches!(b, Body::Weights { .. })).map(|(to, _)| *to).collect()
    };
    let groups = &materials.layout.groups[0];
    let mut users: Vec<ActorId> = groups.iter().flat_map(|g| materials.spec.senders_of(*g)).collect();
    let mut got = handed(&drive(&mut core, commit(1)));
    users.sort();
    got.sort();
    assert_eq!(got, users);
    let mut next = replace(&table(&materials), users[0]);
    next.epoch = 5;
    let got = handed(&drive(&mut core, Event::Table(Arc::new(next))));
    assert!(!got.is_empty() && got.iter().all(|to| *to == users[0]), "{got:?}");
}

/// RE-5: a life that begins between a commit and its state gets the weights of that state, once.
#[test]
fn a_life_that_comes_with_a_commit_gets_the_weights_after_it() {
    let materials = materials();
    let mut core = primary(&materials);
    give(&mut core, &sums(&materials, 1));
    // The job that applies the commit is on its way.
    let applying = core.on(commit(1));
    let [Effect::Compute { job, .. }] = <[Effect; 1]>::try_from(applying).expect("one job") else { panic!("a job") };
    let user = materials.spec.senders_of(materials.layout.groups[0][0])[0];
    let mut next = replace(&table(&materials), user);
    next.epoch = 5;
    let handed = |asked: &Asked| -> Vec<Step> {
        let of = |(to, body): &(ActorId, Body<Tensor>)| match body {
            Body::Weights { step, .. } if *to == user => Some(*step),
            _ => None,
        };
        asked.sent.iter().filter_map(of).collect()
    };
    assert_eq!(handed(&drive(&mut core, Event::Table(Arc::new(next)))), [0; 0]);
    let outcome = crate::compute::run(job, &everstep_kernels::CpuBackend::FP32);
    let got = handed(&drive(&mut core, Event::Computed(outcome)));
    assert!(!got.is_empty() && got.iter().all(|step| *step == 1), "{got:?}");
}

/// RE-6.
#[test]
fn sums_of_other_shapes_are_not_counted() {
    let materials = materials();
    type Spoil = fn(&mut Vec<Tensor>, &mut Vec<u64>);
    let spoilt: [Spoil; 5] = [
        |gradients, _| drop(gradients.pop()),
        |gradients, _| gradients.push(gradients[0].clone()),
        |gradients, _| gradients[0] = Tensor::from_vec(1, 1, vec![0.0]),
        |gradients, _| {
            let (rows, columns) = (gradients[0].rows(), gradients[0].columns());
            gradients[0] = Tensor::bf16(rows, columns, Arc::new(vec![Bf16(0); rows * columns]));
        },
        |_, loads| loads.push(1),
    ];
    for spoil in spoilt {
        let mut core = primary(&materials);
        let mut all = sums(&materials, 1);
        let Body::Sums { gradients, loads, .. } = &mut all[0].1 else { unreachable!() };
        spoil(gradients, loads);
        let (good, bad) = (sums(&materials, 1), all);
        assert_eq!(prepared(&give(&mut core, &bad)), 0);
        assert!(core.describe().contains(&format!("refused {}'s sum", bad[0].0)), "{}", core.describe());
        assert_eq!(prepared(&give(&mut core, &good[..1])), 1);
    }
}

/// LE-1, LE-2: a sum over fewer micro-batches is not counted; nothing balances without it.
#[test]
fn an_incomplete_sum_is_not_counted() {
    let materials = materials();
    let groups = &materials.layout.groups[0];
    let mut ledger = Ledger::new(&materials.spec, 1, groups);
    let missing = ledger.missing();
    let sender = materials.spec.senders_of(groups[0])[0];
    let receipt = |micro_batches| Receipt {
        micro_batches,
        samples: 2,
        gradients: Vec::new(),
        loads: Vec::new(),
        losses: [0.0; 2],
    };
    ledger.credit(sender, groups[0], receipt(1));
    assert_eq!(ledger.missing(), missing);
    ledger.credit(sender, groups[0], receipt(2));
    ledger.credit(sender, groups[0], receipt(2));
    assert_eq!(ledger.missing(), missing - 1);
    assert!(!ledger.balanced());
    assert_eq!(address(sender, 1).actor, sender);
}

/// What a core found in its state.
fn found(asked: &Asked) -> Option<Corruption> {
    asked.sent.iter().find_map(|(_, body)| if let Body::Corrupt(found) = body { Some(*found) } else { None })
}

/// RE-7: a flipped bit is found by the optimizer step that reads it; nothing is made of it.
#[test]
fn a_state_that_changed_by_itself_is_not_stepped_from() {
    let materials = materials();
    for skipped in [false, true] {
        let mut core = primary(&materials);
        core.flip();
        assert_eq!(prepared(&give(&mut core, &sums(&materials, 1))), 1, "nobody has read it yet");
        let body = Body::Commit(Commit { step: 1, clip: 0.5, lr: 0.01, skipped });
        let asked = drive(&mut core, message(ActorId::Supervisor, body));
        let found = found(&asked).expect("it is told");
        assert_eq!((found.step, found.parameter), (0, core.numbers[0]));
        assert_ne!(found.hashes[0], found.hashes[1]);
        assert_eq!(asked.sent.len(), 1, "no weights, no state: {asked:?}");
        // The next supervisor hears it too.
        let asked = drive(&mut core, Event::Table(Arc::new(replace(&table(&materials), ActorId::Supervisor))));
        assert_eq!(self::found(&asked), Some(found));
    }
}

/// RE-7: who gets a state late gets it checked: another copy waits for that, a step with new users' sums too.
#[test]
fn a_state_that_is_given_late_is_checked_first() {
    let materials = materials();
    let mirror = ActorId::Reducer { shard: 0, replica: 1 };
    let mut core = primary(&materials);
    core.flip();
    let asked = drive(&mut core, message(mirror, Body::Fetch { step: 0 }));
    assert!(found(&asked).is_some() && asked.sent.len() == 1, "{asked:?}");

    let mut core = primary(&materials);
    core.flip();
    let mut next = replace(&table(&materials), ActorId::Stage { lane: 0, stage: 0 });
    next.epoch = 3;
    let asked = drive(&mut core, Event::Table(Arc::new(next)));
    assert!(found(&asked).is_some(), "{asked:?}");
    assert_eq!(prepared(&give(&mut core, &sums(&materials, 1))), 0);
}
