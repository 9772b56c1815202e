//! The core of an expert, message by message, with a host that does its work at once.

use super::*;
use crate::compute::run;
use crate::pieces::Pieces;
use crate::testing::{address, bits, drive, materials, table, weights};
use crate::worker::Materials;
use everstep_kernels::CpuBackend;

const ME: ActorId = ActorId::Expert { layer: 1, expert: 0 };

fn expert(materials: &Materials) -> ExpertCore {
    let me = address(ME, 1);
    let mut core = ExpertCore::new(Arc::clone(&materials.spec), Arc::clone(&materials.layout), me);
    drive(&mut core, Event::Table(Arc::new(table(materials))));
    drive(&mut core, weights(materials, Group::Expert { layer: 1, expert: 0 }));
    core
}

fn rows(lane: u32, micro_batch: u32, pass: Pass) -> Event {
    let n = 1 + lane as usize + micro_batch as usize;
    let value = |i| (i as f32 + lane as f32) * 0.1;
    let body = Body::Rows {
        turn: Turn { step: 1, lane, micro_batch },
        pass,
        rows: Tensor::from_vec(n, 4, (0..4 * n).map(value).collect()),
    };
    let from = address(ActorId::Stage { lane, stage: 0 }, 1);
    Event::Local {
        from: ActorId::Host { layer: 1 },
        local: Local::Arrived(Envelope { from, to: address(ME, 1), body }),
    }
}

/// Does what a host does: runs the work that the expert gave out. Gives all that the expert sent.
fn through_host(core: &mut ExpertCore, event: Event) -> (usize, Vec<(ActorId, Body<Tensor>)>) {
    let mut work = 0;
    let mut sent = Vec::new();
    let mut asked = drive(core, event);
    loop {
        sent.append(&mut asked.sent);
        let ready =
            asked.told.into_iter().find_map(|(_, l)| if let Local::Ready(item) = l { Some(item) } else { None });
        let Some(item) = ready else { return (work, sent) };
        work += 1;
        let Outcome::Experts(done) = run(Job::Experts(vec![*item]), &CpuBackend::FP32) else { unreachable!() };
        let (expert, _, turn, result) = done.into_iter().next().unwrap();
        let local = Local::Done { expert, turn, result: Box::new(result) };
        asked = drive(core, Event::Local { from: ActorId::Host { layer: 1 }, local });
    }
}

/// EX-1: a second copy of rows is no work.
#[test]
fn rows_are_computed_once() {
    let materials = materials();
    let mut core = expert(&materials);
    assert_eq!(through_host(&mut core, rows(0, 0, Pass::Forward)).0, 1);
    assert_eq!(through_host(&mut core, rows(0, 0, Pass::Forward)).0, 0);
    // Gradients before their forward pass wait for it.
    assert_eq!(through_host(&mut core, rows(1, 0, Pass::Backward)).0, 0);
    assert_eq!(through_host(&mut core, rows(1, 0, Pass::Forward)).0, 2);
}

/// Rows of another life of their stage.
fn rows_of_life(life: u32, lane: u32, micro_batch: u32, pass: Pass) -> Event {
    let Event::Local { from, local: Local::Arrived(mut envelope) } = rows(lane, micro_batch, pass) else {
        unreachable!("rows arrive")
    };
    envelope.from.incarnation = Incarnation(life);
    Event::Local { from, local: Local::Arrived(envelope) }
}

/// EX-5: a new life of a stage is answered again, once, at whatever point of the step it asks; the sum stays the same.
#[test]
fn a_new_life_of_a_stage_is_answered_again() {
    let materials = materials();
    let turns = [(0, 0), (1, 0), (0, 1), (1, 1)];
    let in_order: Vec<_> =
        [Pass::Forward, Pass::Backward].into_iter().flat_map(|pass| turns.map(|turn| (turn, pass))).collect();
    let mut core = expert(&materials);
    let expected: Vec<_> =
        in_order.iter().flat_map(|((l, m), pass)| through_host(&mut core, rows(*l, *m, *pass)).1).collect();
    // Lane 1's stage dies after each of them, and its next life sends all that is lane 1's from the beginning.
    for died in 0..=in_order.len() {
        let mut core = expert(&materials);
        let mut sent = Vec::new();
        let mut work = 0;
        for ((l, m), pass) in &in_order[..died] {
            let (done, more) = through_host(&mut core, rows(*l, *m, *pass));
            (work, sent) = (work + done, [sent, more].concat());
        }
        for ((l, m), pass) in &in_order {
            let life = 1 + l;
            let copies = [rows_of_life(life, *l, *m, *pass), rows_of_life(life, *l, *m, *pass)];
            for event in copies {
                let (done, more) = through_host(&mut core, event);
                (work, sent) = (work + done, [sent, more].concat());
            }
        }
        let twice = in_order[..died].iter().filter(|((lane, _), _)| *lane == 1).count();
        assert_eq!(work, in_order.len() + twice, "after {died}");
        assert_eq!(bits(&sent), bits(&expected), "after {died}");
        assert!(core.again.is_empty(), "after {died}");
    }
}

/// EX-5: what is at the host when the new life asks goes to it from there.
#[test]
fn rows_at_the_host_are_the_new_lifes_answer() {
    let materials = materials();
    let mut core = expert(&materials);
    let asked = drive(&mut core, rows_of_life(1, 0, 0, Pass::Forward));
    let Some((_, Local::Ready(item))) = asked.told.into_iter().next() else { panic!("work") };
    let asked = drive(&mut core, rows_of_life(2, 0, 0, Pass::Forward));
    assert!(matches!(asked.told[..], [(_, Local::Nothing)]), "{asked:?}");
    let Outcome::Experts(done) = run(Job::Experts(vec![*item]), &CpuBackend::FP32) else { unreachable!() };
    let (expert, _, turn, result) = done.into_iter().next().unwrap();
    let local = Local::Done { expert, turn, result: Box::new(result) };
    drive(&mut core, Event::Local { from: ActorId::Host { layer: 1 }, local });
    assert_eq!(through_host(&mut core, rows_of_life(2, 0, 0, Pass::Forward)).0, 0);
    assert_eq!(through_host(&mut core, rows_of_life(3, 0, 0, Pass::Forward)).0, 1);
}

/// AD-3: an audited stage gets the very answers that its life before had.
#[test]
fn an_audited_stage_gets_copies() {
    let audited = JobSpec { audit: 1, ..(*materials().spec).clone() };
    let materials = crate::testing::of(audited);
    let mut core = expert(&materials);
    through_host(&mut core, rows(0, 0, Pass::Forward));
    let stage = ActorId::Stage { lane: 0, stage: 0 };
    let again = drive(&mut core, Event::Table(Arc::new(crate::testing::replace(&table(&materials), stage))));
    assert!(matches!(again.sent[..], [(to, Body::Answer { .. })] if to == stage), "{again:?}");
    assert_eq!(through_host(&mut core, rows_of_life(2, 0, 0, Pass::Forward)).0, 0);
}

/// EX-6: rows of a fast lane wait until the slowest one's are summed, and lose nothing by it.
#[test]
fn a_lane_is_not_too_far_before_the_slowest() {
    let slow = JobSpec { micro_batches: Pieces::Constant(6), ..(*materials().spec).clone() };
    let materials = crate::testing::of(slow);
    let window = materials.spec.window();
    let mut core = expert(&materials);
    let forward = |core: &mut ExpertCore, lane, m| through_host(core, rows(lane, m, Pass::Forward)).0;
    let taken: Vec<usize> = (0..6).map(|m| forward(&mut core, 0, m)).collect();
    assert_eq!(taken, (0..6).map(|m| usize::from(m < window)).collect::<Vec<_>>());
    let mut work = 0;
    for m in 0..6 {
        for (lane, pass) in [(1, Pass::Forward), (0, Pass::Backward), (1, Pass::Backward)] {
            work += through_host(&mut core, rows(lane, m, pass)).0;
        }
        assert_eq!(core.early.len() as u32, (6 - window).saturating_sub(m + 1), "one more goes on with each sum");
    }
    assert_eq!(work as u32, 3 * 6 + 6 - window);
    assert_eq!(core.outbox.len()[0], 1, "the sum");
}

/// EX-2, EX-3: whatever order rows come in, the sum is the same and leaves when all are in it.
#[test]
fn the_sum_does_not_depend_on_the_order_of_arrival() {
    let materials = materials();
    let sum = |order: &[(u32, u32)]| {
        let mut core = expert(&materials);
        let mut last = Vec::new();
        for pass in [Pass::Forward, Pass::Backward] {
            for (n, (lane, micro_batch)) in order.iter().enumerate() {
                let sent = through_host(&mut core, rows(*lane, *micro_batch, pass)).1;
                let complete = pass == Pass::Backward && n + 1 == order.len();
                assert_eq!(sent.len(), if complete { 2 } else { 0 }, "sums for both copies, at the end");
                last = bits(&sent);
            }
        }
        last
    };
    let ascending = sum(&[(0, 0), (1, 0), (0, 1), (1, 1)]);
    assert_eq!(ascending, sum(&[(1, 1), (0, 1), (1, 0), (0, 0)]));
    assert_eq!(ascending, sum(&[(1, 0), (1, 1), (0, 0), (0, 1)]));
    let Body::Sums { micro_batches, samples, .. } = &ascending[0].1 else { panic!("{ascending:?}") };
    assert_eq!((*micro_batches, *samples), (2, 4));
}

/// EX-4: the host had them when the job went back.
#[test]
fn rows_for_another_life_are_not_taken() {
    let materials = materials();
    let mut core = expert(&materials);
    let Event::Local { from, local: Local::Arrived(mut envelope) } = rows(0, 0, Pass::Forward) else { unreachable!() };
    envelope.to = address(ME, 7);
    let asked = drive(&mut core, Event::Local { from, local: Local::Arrived(envelope) });
    assert!(asked.told.is_empty() && core.rows.is_empty() && core.early.is_empty());
    assert_eq!(through_host(&mut core, rows(0, 0, Pass::Forward)).0, 1);
}

/// EX-4: a result of an earlier life's work is not this life's: what goes with it was refused.
#[test]
fn results_of_another_life_are_not_taken() {
    let materials = materials();
    let mut core = expert(&materials);
    let asked = drive(&mut core, rows(0, 0, Pass::Forward));
    let Some((_, Local::Ready(item))) = asked.told.into_iter().next() else { panic!("work") };
    let Outcome::Experts(done) = run(Job::Experts(vec![*item]), &CpuBackend::FP32) else { unreachable!() };
    let (_, _, turn, result) = done.into_iter().next().unwrap();
    let local = Local::Done { expert: address(ME, 7), turn, result: Box::new(result) };
    drive(&mut core, Event::Local { from: ActorId::Host { layer: 1 }, local });
    assert!(matches!(core.rows[&(0, 0)], Rows::Going));
}
