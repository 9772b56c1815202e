//! Nodes that come, leave, are held ready or cut off.

use super::*;
use crate::table::NodeInfo;

/// SU-6: a node that comes gets what has no place at once, and its share of the work with the next commit.
#[test]
fn actors_move_to_a_new_node_only_with_a_commit() {
    let mut job = started();
    job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
    let places = |job: &Job| -> BTreeMap<ActorId, (NodeId, Incarnation)> {
        let works = |a: &ActorId| matches!(a, ActorId::Stage { .. } | ActorId::Expert { .. });
        let entries = job.supervisor.table().entries.iter().filter(|(a, _)| works(a));
        entries.map(|(a, e)| (*a, (e.node, e.incarnation))).collect()
    };
    let before = places(&job);
    job.on(SupervisorEvent::Join(info(3)));
    // SU-7: a node that has said nothing yet, or does not reach the others, may never do so.
    for down in [&[][..], &[1]] {
        if !down.is_empty() {
            job.on(beat(3, down));
        }
        assert_eq!((places(&job), places_on(&job, 3)), (before.clone(), Vec::new()));
    }
    commit_step(&mut job, 1);
    job.on(beat(3, &[]));
    let copies = places_on(&job, 3);
    assert!(!copies.is_empty() && copies.iter().all(|a| matches!(a, ActorId::Reducer { .. })), "{copies:?}");
    assert_eq!(places(&job), before);
    apply_step(&mut job, 1);
    let effects = commit_step(&mut job, 2);
    let after = places(&job);
    let moved: Vec<_> = after.iter().filter(|(a, place)| before[*a] != **place).collect();
    assert!(!moved.is_empty() && moved.iter().all(|(_, (node, _))| *node == NodeId(3)), "{moved:?}");
    let order = |e: &SupervisorEffect| match e {
        SupervisorEffect::Send(_, Body::Commit(_)) => Some("commit"),
        SupervisorEffect::Announce(_) => Some("table"),
        _ => None,
    };
    let mut order: Vec<&str> = effects.iter().filter_map(order).collect();
    order.dedup();
    assert_eq!(order, ["commit", "table"]);
}

fn places_on(job: &Job, node: u64) -> Vec<ActorId> {
    job.supervisor.table().actors_of(NodeId(node)).map(|address| address.actor).collect()
}

/// All copies in sync prepare a step; gives what comes of it.
fn commit_step(job: &mut Job, step: Step) -> Vec<SupervisorEffect> {
    let mut effects = Vec::new();
    for shard in 0..2 {
        let copies: Vec<u32> = job.supervisor.commit.copies(shard).collect();
        for replica in copies {
            effects.extend(job.say(shard, replica, prepared(step, 4)(shard)));
        }
    }
    assert_eq!(commits(&effects).first().map(|c| c.step), Some(step));
    effects
}

fn apply_step(job: &mut Job, step: Step) -> Vec<SupervisorEffect> {
    let mut effects = Vec::new();
    for shard in 0..2 {
        let copies: Vec<ActorId> = job.supervisor.table().replicas(shard).collect();
        for copy in copies {
            let ActorId::Reducer { replica, .. } = copy else { unreachable!() };
            effects.extend(job.say(shard, replica, applied(step)(shard)));
        }
    }
    effects
}

fn released(effects: &[SupervisorEffect]) -> Vec<NodeId> {
    effects.iter().filter_map(|e| if let SupervisorEffect::Release(node) = e { Some(*node) } else { None }).collect()
}

/// LV-1, CP-1: a node that leaves keeps its actors until a commit, its copies until others have the state; then it is let go.
#[test]
fn a_node_leaves_when_nothing_lives_on_it() {
    let mut job = started();
    job.join(3);
    let before = places_on(&job, 2);
    assert!(before.iter().any(|a| matches!(a, ActorId::Reducer { .. })), "{before:?}");
    let effects = job.on(SupervisorEvent::Leave(NodeId(2)));
    assert_eq!((released(&effects), places_on(&job, 2)), (Vec::new(), before), "nothing moves in the middle of a step");
    let guests = places_on(&job, 3);
    assert!(guests.iter().all(|a| matches!(a, ActorId::Reducer { replica: 2, .. })) && guests.len() == 2, "{guests:?}");
    // Stages and experts go with the commit; the guests have no state yet.
    assert!(released(&commit_step(&mut job, 1)).is_empty());
    assert!(places_on(&job, 2).iter().all(|a| matches!(a, ActorId::Reducer { .. })), "{:?}", places_on(&job, 2));
    apply_step(&mut job, 1);
    // Now they have it: the next commit needs all three copies, and lets the node go.
    let effects = commit_step(&mut job, 2);
    assert_eq!(released(&effects), [NodeId(2)]);
    assert!(!job.supervisor.table().nodes.contains_key(&NodeId(2)) && places_on(&job, 2).is_empty());
    assert!(effects.iter().all(|e| !matches!(e, SupervisorEffect::Note(Happening::NodeDead { .. }))));
    // What it still says is answered in the same way, and the job goes on with what stayed.
    let late = job.on(SupervisorEvent::Heartbeat {
        node: NodeId(2),
        operations: Operations::default(),
        rates: Rates::default(),
        down: Vec::new(),
    });
    assert_eq!(released(&late), [NodeId(2)]);
    assert!(!late.iter().any(|e| matches!(e, SupervisorEffect::Fence(_))));
    apply_step(&mut job, 2);
    commit_step(&mut job, 3);
    // The supervisor's next life knows which numbers were given.
    let next = Job::from_log(job.log.clone());
    assert_eq!(next.supervisor.table(), &{
        let mut table = job.supervisor.table().clone();
        table.epoch += 1;
        for actor in [ActorId::Supervisor, ActorId::Keeper] {
            table.entries.get_mut(&actor).unwrap().incarnation = Incarnation(2);
        }
        table
    });
    assert!(
        next.supervisor.table().is_retired(ActorId::Reducer { shard: 0, replica: 1 }) || {
            next.supervisor.table().is_retired(ActorId::Reducer { shard: 0, replica: 0 })
        }
    );
}

/// PL-2, CP-1: copies that had to share a rack part when a node of another one comes; records count racks.
#[test]
fn copies_part_when_another_domain_comes() {
    let mut job = Job::from_log(Vec::new());
    let racks = [(1, "a"), (2, "a"), (3, "b")];
    let join = |job: &mut Job, (peer, rack): (u64, &str)| {
        job.on(SupervisorEvent::Join(NodeInfo { domain: rack.to_owned(), ..info(peer) }));
        job.on(beat(peer, &[]));
    };
    join(&mut job, racks[0]);
    join(&mut job, racks[1]);
    job.on(beat(1, &[]));
    job.everybody(applied(0));
    let safe =
        |job: &Job| job.log.iter().rev().find_map(|r| if let Record::Commit(c) = r { Some(c.copies) } else { None });
    commit_step(&mut job, 1);
    assert_eq!(safe(&job), Some(1), "two copies in one rack");
    apply_step(&mut job, 1);
    join(&mut job, racks[2]);
    (1..=3).for_each(|n| drop(job.on(beat(n, &[]))));
    for step in 2..=5 {
        commit_step(&mut job, step);
        apply_step(&mut job, step);
    }
    assert_eq!(safe(&job), Some(2));
    for shard in 0..2 {
        let homes: Vec<NodeId> =
            job.supervisor.table().replicas(shard).filter_map(|a| job.supervisor.table().node_of(a)).collect();
        assert_eq!(homes.len(), 2, "{homes:?}");
        let rack = |n: &NodeId| racks.iter().find(|(m, _)| *m == n.0).unwrap().1;
        assert_ne!(rack(&homes[0]), rack(&homes[1]));
    }
    // And stay where they are.
    let before = job.supervisor.table().clone();
    commit_step(&mut job, 6);
    assert_eq!(job.supervisor.table(), &before);
}

/// LV-2: the last node works on, and leaves when another has come.
#[test]
fn the_last_node_waits_for_another() {
    let mut job = started();
    for n in [1, 2] {
        job.on(SupervisorEvent::Leave(NodeId(n)));
    }
    let said = job.supervisor.parting(NodeId(9));
    assert!(said.contains("no node 9") && said.contains("node 1, node 2"), "{said}");
    assert!(released(&commit_step(&mut job, 1)).is_empty() && !places_on(&job, 1).is_empty());
    apply_step(&mut job, 1);
    job.join(3);
    for node in 1..=3 {
        job.on(beat(node, &[]));
    }
    let mut gone = released(&commit_step(&mut job, 2));
    apply_step(&mut job, 2);
    gone.extend(released(&commit_step(&mut job, 3)));
    assert_eq!(gone, [NodeId(1), NodeId(2)]);
}

/// Spares have no actors until they are needed, and then at once.
#[test]
fn a_spare_takes_over() {
    let mut job = started();
    job.supervisor.spares = 1;
    job.join(3);
    for node in 1..=3 {
        job.on(beat(node, &[]));
    }
    commit_step(&mut job, 1);
    apply_step(&mut job, 1);
    assert!(places_on(&job, 3).is_empty(), "{:?}", places_on(&job, 3));
    let lost = places_on(&job, 2);
    job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
    assert_eq!(places_on(&job, 3), lost);
}

/// Ten times: each node's beat, then a tick. Gives whom the supervisor gave up, and why.
fn beats(job: &mut Job, all: &[(u64, &[u64])]) -> Vec<String> {
    let mut lost = Vec::new();
    for _ in 0..10 {
        job.now += Duration::from_millis(50);
        let told = all.iter().map(|(node, down)| beat(*node, down)).chain([SupervisorEvent::Tick]);
        for event in told {
            lost.extend(job.on(event).into_iter().filter_map(|e| match e {
                SupervisorEffect::Note(Happening::NodeDead { node, why, .. }) => Some(format!("{node}: {why}")),
                _ => None,
            }));
        }
    }
    lost
}

/// LI-1, LI-2, SU-7: of two nodes that do not reach each other one is given up; what comes in its place gets its share when
/// it reaches the others.
#[test]
fn a_cut_between_two_nodes_is_decided() {
    let mut job = started();
    assert_eq!(beats(&mut job, &[(1, &[2]), (2, &[])]), ["2: it has no link to node 1"]);
    job.on(SupervisorEvent::Join(info(3)));
    assert_eq!(beats(&mut job, &[(1, &[3]), (3, &[1])]), [""; 0], "it has no actors: it waits");
    assert!(places_on(&job, 3).is_empty());
    commit_step(&mut job, 1);
    apply_step(&mut job, 1);
    assert!(places_on(&job, 3).is_empty());
    assert_eq!(beats(&mut job, &[(1, &[]), (3, &[])]), [""; 0]);
    commit_step(&mut job, 2);
    assert!(!places_on(&job, 3).is_empty());
}

/// SU-7: two nodes that come and do not reach each other are no reason for a job to wait: the first one works.
#[test]
fn one_of_two_strangers_works() {
    let mut job = started();
    for node in [1, 2] {
        job.on(SupervisorEvent::Lost { node: NodeId(node), why: "test".to_owned() });
    }
    for peer in [3, 4] {
        job.on(SupervisorEvent::Join(info(peer)));
    }
    assert_eq!(beats(&mut job, &[(3, &[4]), (4, &[3])]), [""; 0]);
    assert!(!places_on(&job, 3).is_empty() && places_on(&job, 4).is_empty());
}

/// What fits nowhere waits; operators are told once what it needs, and it gets a place when a node with room comes.
#[test]
fn without_room_the_job_waits_and_says_so() {
    let mut job = Job::from_log(Vec::new());
    let whole: u64 = {
        let costs = crate::costs::Costs::new(&materials().spec);
        let copies = (0..2).map(|shard| ActorId::Reducer { shard, replica: 0 });
        costs.workers().chain(copies).map(|a| costs.bytes(a)).sum()
    };
    let waits = |effects: &[SupervisorEffect]| -> Vec<String> {
        let why = |e: &SupervisorEffect| match e {
            SupervisorEffect::Note(Happening::Waiting { why }) => Some(why.clone()),
            _ => None,
        };
        effects.iter().filter_map(why).collect()
    };
    let mut said = Vec::new();
    for peer in 1..=2 {
        let info = NodeInfo { memory: whole / 3, ..info(peer) };
        said.extend(waits(&job.on(SupervisorEvent::Join(info))));
        said.extend(waits(&job.on(beat(peer, &[]))));
        said.extend(waits(&job.on(beat(peer, &[]))));
    }
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("no node has room") && said[0].contains("goes on when a node"), "{said:?}");
    assert!(job.supervisor.describe().contains("no node has room"));
    job.on(SupervisorEvent::Join(NodeInfo { memory: whole, ..info(3) }));
    job.on(beat(3, &[]));
    assert!(!job.supervisor.describe().contains("no node has room"), "{}", job.supervisor.describe());
    let placed = job.supervisor.table().entries.keys().filter(|a| !matches!(a, ActorId::Reducer { .. })).count();
    assert_eq!(placed, 2 + materials().spec.workers().len());
}

/// SU-6: what cannot leave a node for want of room is told of, until there is room.
#[test]
fn a_drain_without_room_is_told_of() {
    let mut job = started();
    job.on(SupervisorEvent::Join(NodeInfo { memory: 1, ..info(3) }));
    job.on(beat(3, &[]));
    job.on(SupervisorEvent::Leave(NodeId(2)));
    let said = job.supervisor.describe();
    assert!(said.contains("2 copies of shards") && said.contains("stay until one with room comes"), "{said}");
    job.join(4);
    let said = job.supervisor.describe();
    assert!(!said.contains("stay until"), "{said}");
}

/// SP-2: a slow node is named; it has less to do after the next commit if that is wanted, and all of its share again when it
/// keeps up.
#[test]
fn a_slow_node_is_named_and_relieved() {
    for relieve in [false, true] {
        let mut job = started();
        job.supervisor.relieve = relieve;
        let share = |job: &Job| places_on(job, 2).iter().map(|a| job.supervisor.costs.of(*a)).sum::<u64>();
        let before = share(&job);
        let mut rates = [Rates::default(); 2];
        let mut notes = Vec::new();
        // Seconds of both nodes in a period.
        for (n, seconds) in [[1, 4]; 4].into_iter().chain([[1, 1]; 4]).enumerate() {
            for _ in 0..100 {
                job.now += Duration::from_millis(50);
                for (node, rates) in rates.iter_mut().enumerate() {
                    rates.0[0] = [rates.0[0][0] + 100, rates.0[0][1] + seconds[node] * 10_000];
                    let beat = SupervisorEvent::Heartbeat {
                        node: NodeId(node as u64 + 1),
                        operations: Operations::default(),
                        rates: *rates,
                        down: Vec::new(),
                    };
                    job.on(beat);
                }
                notes.extend(job.on(SupervisorEvent::Tick).into_iter().filter_map(|e| match e {
                    SupervisorEffect::Note(note @ (Happening::NodeSlow { .. } | Happening::NodeKeepsUp { .. })) => {
                        Some(note)
                    }
                    _ => None,
                }));
            }
            if n % 4 == 3 {
                let step = n as Step / 4 + 1;
                commit_step(&mut job, step);
                apply_step(&mut job, step);
                // Evened out anew it may be an expert more or less.
                let (least, most) =
                    if relieve && step == 1 { (0, before / 2) } else { (before * 9 / 10, before * 11 / 10) };
                assert!((least..=most).contains(&share(&job)), "{} of {before}", share(&job));
            }
        }
        assert_eq!(notes, [Happening::NodeSlow { node: 2, percent: 400 }, Happening::NodeKeepsUp { node: 2 }]);
    }
}
