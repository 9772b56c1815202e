//! The way back, and what waits: for the store (SU-8, SU-9), or for copies (CO-6).

use super::*;
use crate::table::NodeInfo;

/// CO-6: what is thin waits, says so, and goes on with the new copy; without the wish it goes on at once.
#[test]
fn a_job_waits_for_its_copies_if_it_is_to() {
    for waits in [false, true] {
        let spec = JobSpec { thin_waits: waits, ..(*materials().spec).clone() };
        let mut job = begun(Job::of(Arc::new(spec), NODES, Vec::new()));
        job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
        let mut effects = Vec::new();
        for shard in 0..2 {
            let primary = job.supervisor.table().primary(shard).unwrap();
            let ActorId::Reducer { replica, .. } = primary else { unreachable!("a reducer") };
            effects.extend(job.say(shard, replica, prepared(1, 4)(shard)));
        }
        assert_eq!(commits(&effects).is_empty(), waits);
        let said = |e: &SupervisorEffect| matches!(e, SupervisorEffect::Note(Happening::Waiting { why }) if why.contains("when_thin"));
        assert_eq!(effects.iter().any(said), waits, "{effects:?}");
        if waits {
            job.join(3);
            let new: Vec<ActorId> =
                job.supervisor.reducers().filter(|r| job.supervisor.table().node_of(*r) == Some(NodeId(3))).collect();
            assert_eq!(new.len(), 2);
            for actor in new {
                let ActorId::Reducer { shard, replica } = actor else { unreachable!("a reducer") };
                job.say(shard, replica, applied(0)(shard));
                effects = job.say(shard, replica, prepared(1, 4)(shard));
            }
            assert!(!commits(&effects).is_empty());
        }
    }
}

/// SU-9: steps are committed before the store is read; what would send the job back waits, says so, and is for one reason.
#[test]
fn a_job_goes_on_before_its_store_is_read() {
    let mut job = started();
    job.everybody(prepared(1, 4));
    job.everybody(applied(1));
    let mut next = Job::unread(job.log.clone());
    next.everybody(applied(1));
    assert_eq!(commits(&next.everybody(prepared(2, 4))).len(), 4);
    next.everybody(applied(2));
    let lost = |node| SupervisorEvent::Lost { node: NodeId(node), why: "test".to_owned() };
    let effects: Vec<_> = [1, 2].into_iter().flat_map(|node| next.on(lost(node))).collect();
    let words = |effects: &[SupervisorEffect]| {
        let waiting = |e: &SupervisorEffect| match e {
            SupervisorEffect::Note(Happening::Waiting { why }) if why.contains("its store can be read") => {
                Some(why.clone())
            }
            _ => None,
        };
        effects.iter().filter_map(waiting).collect::<Vec<_>>()
    };
    assert!(words(&effects)[..].iter().any(|why| why.contains("lost all its copies")), "{effects:?}");
    assert!(words(&next.join(3)).is_empty(), "it is told once");
    assert!(!next.supervisor.table().goes_back() && next.supervisor.committed() == 2);
    let rolled = |effects: &[SupervisorEffect]| {
        let back = |e: &SupervisorEffect| match e {
            SupervisorEffect::Note(Happening::RolledBack { to_step, .. }) => Some(*to_step),
            _ => None,
        };
        effects.iter().filter_map(back).collect::<Vec<_>>()
    };
    let effects = next.on(read_as(Ok(1)));
    assert_eq!((rolled(&effects), next.supervisor.table().base), (vec![1], 1));
    assert!(next.supervisor.table().goes_back() && next.supervisor.committed() == 1);
}

/// SU-9: copies that differ send the job back, also if nobody sees it again: the next supervisor knows.
#[test]
fn the_wish_to_go_back_outlives_its_supervisor() {
    let mut job = started();
    job.everybody(prepared(1, 4));
    let mut next = Job::unread(job.log.clone());
    for (shard, replica) in [(0, 0), (1, 0), (1, 1)] {
        next.say(shard, replica, applied(1)(shard));
    }
    let other = Body::Applied { step: 1, sums: sums(0, 77) };
    next.say(0, 1, other);
    assert!(matches!(next.log.last(), Some(Record::Back(why)) if why.contains("differ in state of step 1")));
    let mut last = Job::unread(next.log.clone());
    // By then they are the same, and wrong.
    last.everybody(applied(1));
    assert!(commits(&last.everybody(prepared(2, 4))).is_empty());
    assert!(last.supervisor.reported.is_empty(), "what is doubted is not reported");
    last.on(read_as(Ok(0)));
    assert!(last.supervisor.table().goes_back());
    assert!(!Job::from_log(last.log.clone()).supervisor.table().primaries.contains(&Some(0)));
}

/// SU-9: a job that was going back to a checkpoint that is damaged goes back further; one that has stored its last step is over.
#[test]
fn what_is_found_decides_how_a_job_goes_on() {
    let mut job = started();
    job.on(SupervisorEvent::Checkpointed(2));
    [1, 2]
        .into_iter()
        .for_each(|node| drop(job.on(SupervisorEvent::Lost { node: NodeId(node), why: "test".to_owned() })));
    assert_eq!(job.supervisor.table().base, 2);
    for (found, base) in [(2, 2), (1, 1)] {
        let mut next = Job::unread(job.log.clone());
        let before = next.supervisor.table().epoch;
        next.on(read_as(Ok(found)));
        assert_eq!(next.supervisor.table().base, base);
        assert_eq!(next.supervisor.table().epoch - before, 2 - base, "an epoch only if it goes back further");
    }
    let mut job = started();
    job.everybody(prepared(1, 4));
    for (found, over) in [(0, false), (1, true)] {
        let mut next = Job::of(Arc::new(JobSpec { steps: 1, ..(*materials().spec).clone() }), NODES, job.log.clone());
        next.everybody(applied(1));
        let effects = next.on(read_as(Ok(found)));
        assert_eq!(effects.iter().any(|e| matches!(e, SupervisorEffect::Finish(Ok(())))), over);
    }
}

/// SU-8: damaged checkpoints do not end a job whose copies live, and end one that has lost them.
#[test]
fn damaged_checkpoints_end_only_a_job_that_nobody_holds() {
    let mut job = started();
    job.everybody(prepared(1, 4));
    job.everybody(applied(1));
    let with = |found| {
        let mut next = Job::unread(job.log.clone());
        assert_eq!(failure(&next.asked), None);
        assert_eq!(failure(&next.on(read_as(found))), None);
        next
    };
    let why = || "no checkpoint can be read: chunk 7 is damaged".to_owned();
    for (checkpoint, stored, ends) in [(Ok(0), false, false), (Err(why()), true, false), (Err(why()), false, true)] {
        let mut next = with(checkpoint);
        next.everybody(applied(1));
        if stored {
            next.on(SupervisorEvent::Checkpointed(1));
        }
        let lost = |node| SupervisorEvent::Lost { node: NodeId(node), why: "test".to_owned() };
        let effects: Vec<_> = [1, 2].into_iter().flat_map(|node| next.on(lost(node))).collect();
        assert_eq!(failure(&effects), ends.then(why));
    }
}

/// SU-5, SU-9: what earlier lives reported since the checkpoint is known once that is: it must be given again, and may be stored.
/// What is doubted is not.
#[test]
fn what_was_reported_since_the_checkpoint_is_known_once_that_is_read() {
    let mut job = started();
    job.everybody(prepared(1, 4));
    job.everybody(applied(1));
    let lines = || SupervisorEvent::Found { newest: Ok(0), reported: [(1, "other".to_owned())].into() };
    let verified = |e: &SupervisorEffect| matches!(e, SupervisorEffect::Verified(1, of) if of == "other");
    let doubted = [&job.log[..], &[Record::Doubt(0)]].concat();
    for (log, known) in [(job.log.clone(), true), (doubted, false)] {
        let mut next = Job::unread(log);
        let effects = next.on(lines());
        assert_eq!((effects.iter().any(verified), next.supervisor.reported.contains_key(&1)), (known, known));
        let lost = |node| SupervisorEvent::Lost { node: NodeId(node), why: "test".to_owned() };
        [1, 2].into_iter().for_each(|node| drop(next.on(lost(node))));
        [3, 4].into_iter().for_each(|peer| drop(next.join(peer)));
        next.everybody(applied(0));
        assert!(next.supervisor.committed() == 0);
        next.everybody(prepared(1, 4));
        let effects = next.everybody(applied(1));
        assert_eq!(failure(&effects).is_some_and(|why| why.contains("not other")), known, "{effects:?}");
    }
}

/// A checkpoint may be stored before the line of its step is written: if all end then, that is written when the job is back there.
#[test]
fn the_step_of_the_checkpoint_is_reported_if_that_was_not_done() {
    let mut job = started();
    job.everybody(prepared(1, 4));
    for log in [job.log.clone(), Record::compacted(&job.log)] {
        let mut next = Job::unread(log);
        next.on(read_as(Ok(1)));
        let lost = |node| SupervisorEvent::Lost { node: NodeId(node), why: "test".to_owned() };
        [1, 2].into_iter().for_each(|node| drop(next.on(lost(node))));
        assert_eq!((next.supervisor.table().goes_back(), next.supervisor.table().base), (true, 1));
        let mut last = Job::unread(next.log.clone());
        last.on(read_as(Ok(1)));
        for mut job in [next, last] {
            [3, 4].into_iter().for_each(|peer| drop(job.join(peer)));
            let reported = |e: &SupervisorEffect| matches!(e, SupervisorEffect::Report(r) if r.commit.commit.step == 1);
            assert_eq!(job.everybody(applied(1)).iter().filter(|e| reported(e)).count(), 1);
        }
    }
}

/// The event of the newest checkpoint may have been lost with the life before.
#[test]
fn a_new_life_tells_of_its_checkpoint() {
    let mut job = started();
    job.everybody(prepared(1, 4));
    job.everybody(applied(1));
    let told = |log: &[Record], step| {
        let effects = Job::unread(log.to_vec()).on(read_as(Ok(step)));
        let stored = |e: &SupervisorEffect| match e {
            SupervisorEffect::Note(Happening::CheckpointStored { step }) => Some(*step),
            _ => None,
        };
        effects.iter().filter_map(stored).collect::<Vec<_>>()
    };
    assert_eq!([told(&[], 0), told(&job.log, 0), told(&job.log, 1)], [vec![], vec![], vec![1]]);
}

fn racked(nodes: Nodes, thin_waits: bool, racks: &[&str]) -> Job {
    let spec = Arc::new(JobSpec { thin_waits, ..(*materials().spec).clone() });
    let mut job = Job::of(spec, nodes, Vec::new());
    job.on(read_as(Ok(0)));
    for (peer, rack) in (1..).zip(racks) {
        job.on(SupervisorEvent::Join(NodeInfo { domain: (*rack).to_owned(), ..info(peer) }));
        job.on(beat(peer, &[]));
    }
    job
}

fn with_copies(job: &Job) -> BTreeSet<NodeId> {
    job.supervisor.reducers().filter_map(|copy| job.supervisor.table().node_of(copy)).collect()
}

/// CO-6: a spare of the domain that a step waits for is none.
#[test]
fn a_spare_of_the_missing_domain_takes_copies() {
    for (waits, taken) in [(true, NodeId(4)), (false, NodeId(3))] {
        let mut job = racked(Nodes { wanted: 2, spares: 2, relieve: false }, waits, &["a", "b", "a", "b"]);
        assert_eq!(with_copies(&job), [NodeId(1), NodeId(2)].into());
        job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
        assert!(with_copies(&job).contains(&taken), "{:?}", with_copies(&job));
    }
}

/// CO-6: a copy does not leave if a step would then wait for another domain.
#[test]
fn the_last_copy_of_another_domain_stays() {
    for waits in [true, false] {
        let mut job = racked(Nodes { wanted: 3, spares: 0, relieve: false }, waits, &["b", "a", "a"]);
        let everybody = |job: &mut Job| {
            let copies: Vec<ActorId> = job.supervisor.reducers().collect();
            for copy in copies {
                let ActorId::Reducer { shard, replica } = copy else { unreachable!("a reducer") };
                job.say(shard, replica, applied(0)(shard));
            }
        };
        everybody(&mut job);
        assert!(with_copies(&job).contains(&NodeId(1)));
        job.on(SupervisorEvent::Leave(NodeId(1)));
        everybody(&mut job);
        job.supervisor.place(true);
        assert_eq!(with_copies(&job).contains(&NodeId(1)), waits);
        let said = job.supervisor.waits().map(|wait| job.supervisor.words_of(wait));
        assert_eq!(said.is_some_and(|why| why.contains("nodes that are to leave stay")), waits);
    }
}

/// SU-9: a job that goes back already, and finds that copies differ, needs no store to begin again.
#[test]
fn a_job_that_goes_back_already_begins_again_at_once() {
    let mut job = Job::from_log(Vec::new());
    job.join(1);
    job.join(2);
    let mut next = Job::unread(job.log.clone());
    let before = next.supervisor.table().clone();
    assert!(before.goes_back());
    next.say(0, 0, applied(0)(0));
    let effects = next.say(0, 1, Body::Applied { step: 0, sums: sums(0, 77) });
    assert!(effects.iter().any(|e| matches!(e, SupervisorEffect::Note(Happening::RolledBack { to_step: 0, .. }))));
    assert!(next.log.iter().all(|r| !matches!(r, Record::Back(_))));
}
