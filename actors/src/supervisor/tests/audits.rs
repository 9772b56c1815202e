//! Audits: what is asked, what is compared, and what becomes of those who differ.

use super::*;
use crate::ids::Address;

/// As [`started`], with every actor audited in every step, and on so many nodes.
fn audited(nodes: u64) -> Job {
    let mut job = started();
    Arc::make_mut(&mut job.supervisor.spec).audit = 1;
    (3..=nodes).for_each(|node| drop(job.join(node)));
    job
}

fn asked(effects: &[SupervisorEffect]) -> Vec<ActorId> {
    let audit = |e: &SupervisorEffect| match e {
        SupervisorEffect::Send(to, Body::Audit { .. }) => Some(*to),
        _ => None,
    };
    effects.iter().filter_map(audit).collect()
}

/// The life that is asked now, and where it is.
fn present(job: &Job, actor: ActorId) -> (Address, NodeId) {
    let table = job.supervisor.table();
    (table.address(actor).unwrap(), table.node_of(actor).unwrap())
}

fn answer(job: &mut Job, actor: ActorId, digest: u128) -> Vec<SupervisorEffect> {
    let (from, _) = present(job, actor);
    job.on(SupervisorEvent::Message { from, body: Body::Audited { step: 1, digest } })
}

fn dead(effects: &[SupervisorEffect]) -> Vec<u64> {
    let node = |e: &SupervisorEffect| match e {
        SupervisorEffect::Note(Happening::NodeDead { node, .. }) => Some(*node),
        _ => None,
    };
    effects.iter().filter_map(node).collect()
}

/// AU-2: one after another is made again on another node, and the step is committed when all are equal.
#[test]
fn a_step_waits_for_its_audits() {
    let mut job = audited(2);
    let mut effects = job.everybody(prepared(1, 4));
    let workers: Vec<ActorId> = job.supervisor.costs.workers().collect();
    for (n, worker) in workers.iter().enumerate() {
        assert!(commits(&effects).is_empty());
        assert_eq!(asked(&effects), [*worker]);
        let first = present(&job, *worker);
        assert_eq!(asked(&answer(&mut job, *worker, n as u128)), [*worker]);
        let second = present(&job, *worker);
        assert!(second.0.incarnation > first.0.incarnation && second.1 != first.1);
        // What the first life still says is nobody's answer.
        let body = Body::Audited { step: 1, digest: 99 };
        assert!(job.on(SupervisorEvent::Message { from: first.0, body }).is_empty());
        effects = answer(&mut job, *worker, n as u128);
    }
    assert_eq!(commits(&effects).first().map(|c| c.step), Some(1));
}

/// AU-2: who dies before it has told is made again for that reason, and the next one's turn comes; of who has told the next life
/// is asked.
#[test]
fn who_dies_is_not_audited_unless_it_has_told() {
    for told in [false, true] {
        let mut job = audited(2);
        let first = asked(&job.everybody(prepared(1, 4)))[0];
        if told {
            answer(&mut job, first, 7);
        }
        let (address, _) = present(&job, first);
        let effects = job.on(SupervisorEvent::ActorFailed { address, reason: "test".to_owned() });
        let next = asked(&effects);
        assert!(next.len() == 1 && (next[0] == first) == told, "{next:?}");
        if told {
            assert!(way_back(&answer(&mut job, first, 8)).is_some());
        }
    }
}

/// AU-2: a node that has told is not asked to confirm itself.
#[test]
fn a_life_on_a_node_that_has_told_says_nothing_new() {
    let mut job = audited(2);
    let actor = asked(&job.everybody(prepared(1, 4)))[0];
    let (_, node) = present(&job, actor);
    answer(&mut job, actor, 7);
    let (_, other) = present(&job, actor);
    job.on(SupervisorEvent::Lost { node: other, why: "test".to_owned() });
    assert_eq!(present(&job, actor).1, node);
    job.join(3);
    let effects = answer(&mut job, actor, 7);
    assert_eq!(asked(&effects), [actor], "somebody else is asked: {effects:?}");
    assert_ne!(present(&job, actor).1, node);
    assert!(way_back(&answer(&mut job, actor, 8)).is_some());
}

/// AU-3: the third decides; who is alone with its hash is given up, and the job goes back.
#[test]
fn of_three_the_one_that_is_alone_is_given_up() {
    for digests in [[1, 2, 2], [2, 1, 2]] {
        let mut job = audited(3);
        let actor = asked(&job.everybody(prepared(1, 4)))[0];
        let mut nodes = Vec::new();
        let mut effects = Vec::new();
        for digest in digests {
            nodes.push(present(&job, actor).1);
            effects = answer(&mut job, actor, digest);
        }
        nodes.sort_unstable();
        assert_eq!(nodes, [1, 2, 3].map(NodeId));
        let why = way_back(&effects).unwrap();
        let wrong = dead(&effects);
        assert_eq!(wrong.len(), 1);
        let alone = format!("{:032x} on node {}", 1, wrong[0]);
        assert!(why.contains(&alone) && why.contains(&format!("node {} computes wrongly", wrong[0])), "{why}");
    }
}

/// AU-3: of two, or of three that all differ, nobody can say which is right: the job goes back, and none is given up.
#[test]
fn without_a_majority_nobody_is_given_up() {
    for nodes in [2, 3] {
        let mut job = audited(nodes);
        let actor = asked(&job.everybody(prepared(1, 4)))[0];
        let mut effects = Vec::new();
        for digest in 0..u128::from(nodes) {
            effects = answer(&mut job, actor, digest);
        }
        assert!(way_back(&effects).unwrap().contains("which is right nobody can say"));
        assert!(dead(&effects).is_empty());
    }
}

/// SU-9: which steps are doubted is known when the store has been read; until then nothing is committed.
#[test]
fn a_difference_waits_for_the_store() {
    let mut job = audited(3);
    job.supervisor.checkpoint = None;
    let actor = asked(&job.everybody(prepared(1, 4)))[0];
    let mut effects = Vec::new();
    for digest in [1, 2, 2] {
        effects = answer(&mut job, actor, digest);
    }
    assert!(way_back(&effects).is_none() && dead(&effects).is_empty());
    assert!(!job.log.iter().any(|r| matches!(r, Record::Doubt(_))));
    let kept = |r: Option<&Record>| matches!(r, Some(Record::Audit { made, .. }) if made.len() == 3);
    assert!(kept(job.log.last()), "the next supervisor would compare them too");
    assert!(commits(&job.everybody(prepared(1, 4))).is_empty());
    let effects = job.on(read_as(Ok(0)));
    assert!(way_back(&effects).is_some() && dead(&effects).len() == 1);
    assert!(job.log.iter().any(|r| matches!(r, Record::Doubt(0))));
}

/// AU-4: what was reported of steps since the checkpoint is forgotten, by later lives too.
#[test]
fn steps_that_were_not_audited_may_come_out_otherwise() {
    let mut job = audited(3);
    job.supervisor.reported.insert(1, "made without an audit".to_owned());
    let actor = asked(&job.everybody(prepared(1, 4)))[0];
    [1, 2, 2].into_iter().for_each(|digest| drop(answer(&mut job, actor, digest)));
    assert!(!job.supervisor.reported.contains_key(&1));
    for log in [job.log.clone(), Record::compacted(&job.log)] {
        let reported = [(1, "made without an audit".to_owned())].into();
        let (next, _) = Supervisor::new(materials().spec, NODES, &log, reported, Duration::ZERO);
        assert!(next.reported.is_empty());
        // Once they are done again it is over.
        let mut later = log.clone();
        later.extend([committed(1), committed(2)]);
        assert_eq!(Record::doubted(&later), None);
        assert!(Record::compacted(&later).iter().all(|r| !matches!(r, Record::Doubt(_))));
    }
}

/// AU-2: a new supervisor asks again before it commits, and compares with what the last one was told.
#[test]
fn a_new_supervisor_goes_on_with_an_audit() {
    let mut job = audited(2);
    let actor = asked(&job.everybody(prepared(1, 4)))[0];
    answer(&mut job, actor, 7);
    for log in [job.log.clone(), Record::compacted(&job.log)] {
        let mut next = Job::from_log(log);
        Arc::make_mut(&mut next.supervisor.spec).audit = 1;
        let mut effects = Vec::new();
        for node in [1, 2] {
            effects.extend(next.on(SupervisorEvent::Return(NodeId(node))));
            next.on(beat(node, &[]));
        }
        assert_eq!(asked(&effects), [actor]);
        next.everybody(applied(0));
        assert!(commits(&next.everybody(prepared(1, 4))).is_empty());
        let effects = answer(&mut next, actor, 8);
        assert!(way_back(&effects).unwrap().contains("hashes"), "{effects:?}");
    }
}

/// AU-4: whoever dies between the doubt and the epoch that acts on it leaves a way back.
#[test]
fn a_doubt_on_which_nothing_was_decided_sends_the_next_supervisor_back() {
    let mut job = audited(3);
    let actor = asked(&job.everybody(prepared(1, 4)))[0];
    [1, 2, 2].into_iter().for_each(|digest| drop(answer(&mut job, actor, digest)));
    let doubt = job.log.iter().position(|r| matches!(r, Record::Doubt(_))).unwrap();
    let goes_back = |job: &Job| job.supervisor.table().primaries.iter().all(Option::is_none);
    let cut = job.log[..=doubt].to_vec();
    for log in [cut.clone(), Record::compacted(&cut)] {
        assert!(goes_back(&Job::from_log(log)));
    }
    assert!(!goes_back(&Job::from_log(job.log[..doubt].to_vec())));
}
