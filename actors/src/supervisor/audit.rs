//! Audits: the work of some actors in a step is made again on another node before the step is committed, and compared.
//!
//! An audited actor tells the hash of all that it made in the step, gets its next life on another node, which replays the
//! step as after a failure, and that one tells its hash too. What it sends twice is dropped by those who have it, so an
//! audit that finds nothing changes nothing.
//! - AU-1: who is audited is a pure function of seed, step and actor: one in `recovery.audit` on the average.
//! - AU-2: a step is committed only when all hashes of its audits are equal. Of an actor that has told its hash the next life is
//!   asked, whatever ended the last one and whoever is supervisor meanwhile. One that dies before it has told is not audited in
//!   this step: nobody knows what it made.
//! - AU-3: of two that differ a third node decides. The one that is alone with its hash is given up, and the job goes back
//!   to the newest checkpoint: others may have worked with what it made. The verdict supposes that all three had the same
//!   inputs: if a primary's weights changed in memory after it handed them out, or a sender was made again in this step
//!   and makes other bits now, the way back is right and the node that is named may not be.
//! - AU-4: steps since that checkpoint that were committed without an audit may be wrong: they are done again, and reported
//!   again with what comes of them. What the node made before the checkpoint is not looked at again.

use super::back::Back;
use super::{Happening, Record, Supervisor, SupervisorEffect};
use crate::audit::is_due;
use crate::ids::{ActorId, Address, NodeId, Step};
use crate::message::Body;
use crate::plant::{Bug, planted};
use crate::table::Entry;
use std::collections::VecDeque;
use std::time::Duration;

/// The audits of a step, one after another: whoever is made again meets all others as they were.
#[derive(Debug)]
pub(super) struct Audit {
    step: Step,
    /// That are still to come.
    due: VecDeque<ActorId>,
    subject: Option<Subject>,
}

/// An actor whose work is made again.
#[derive(Debug)]
struct Subject {
    /// The life that was asked last.
    asked: Address,
    /// What lives made of the step, and where.
    made: Vec<(NodeId, u128)>,
}

impl Supervisor {
    /// AU-1.
    fn due(&self, step: Step) -> VecDeque<ActorId> {
        self.costs.workers().filter(|actor| is_due(&self.spec, *actor, step)).collect()
    }

    /// Whether audits are in the way of the next step's commit, which could be now (AU-2); and what begins them.
    pub(super) fn audit(&mut self) -> Option<Vec<SupervisorEffect>> {
        let step = self.committed() + 1;
        if self.audit.as_ref().is_none_or(|audit| audit.step != step) {
            self.audit = Some(Audit { step, due: self.due(step), subject: None });
        }
        let (table, audit) = (&self.table, self.audit.as_mut()?);
        // A life that ended by itself is made again for that reason, now or when there is room for it.
        let lives = |actor: ActorId| {
            table.address(actor).filter(|_| table.node_of(actor).is_some_and(|n| table.nodes.contains_key(&n)))
        };
        audit.subject.take_if(|subject| subject.made.is_empty() && lives(subject.asked.actor) != Some(subject.asked));
        if let Some(subject) = &mut audit.subject {
            let Some(asked) = lives(subject.asked.actor).filter(|present| *present != subject.asked) else {
                return Some(Vec::new());
            };
            subject.asked = asked;
            return Some(self.after_sync(vec![SupervisorEffect::Send(asked.actor, Body::Audit { step })]));
        }
        let asked = std::iter::from_fn(|| audit.due.pop_front()).find_map(lives)?;
        audit.subject = Some(Subject { asked, made: Vec::new() });
        // Nobody listens to a supervisor of whom no table has told yet.
        Some(self.after_sync(vec![SupervisorEffect::Send(asked.actor, Body::Audit { step })]))
    }

    /// An audited actor tells what it made.
    pub(super) fn audited(&mut self, from: Address, step: Step, digest: u128) -> Vec<SupervisorEffect> {
        let Some(node) = self.table.node_of(from.actor) else { return Vec::new() };
        let audit = self.audit.as_mut().filter(|audit| audit.step == step);
        let subject = audit.and_then(|audit| audit.subject.as_mut()).filter(|subject| subject.asked == from);
        let Some(subject) = subject else { return Vec::new() };
        // A node that has told already tells nothing new.
        if subject.made.iter().all(|(told, _)| *told != node) {
            subject.made.push((node, digest));
        }
        let made = subject.made.clone();
        if let [(first_node, first), (second_node, second)] = made[..]
            && first == second
        {
            self.end_audit();
            let (actor, nodes) = (from.actor.to_string(), [first_node.0, second_node.0]);
            return vec![SupervisorEffect::Note(Happening::Audited { step, actor, nodes })];
        }
        let nodes: Vec<NodeId> = made.iter().map(|(node, _)| *node).collect();
        // A spare decides if nobody else can: the one that is given up leaves it a place.
        let elsewhere = match made.len() {
            1 => self.elsewhere(from.actor, &nodes, &self.working()),
            2 if planted(Bug::SpareNotAsked) => self.elsewhere(from.actor, &nodes, &self.working()),
            2 => [self.working(), self.ready()].iter().find_map(|among| self.elsewhere(from.actor, &nodes, among)),
            _ => None,
        };
        match elsewhere {
            Some(node) => self.make_again(from.actor, step, node),
            // There is nobody to compare with.
            None if made.len() < 2 => {
                self.end_audit();
                Vec::new()
            }
            None => self.differs(from.actor, step, &made),
        }
    }

    /// Goes on with the audit that the supervisor before this one had begun.
    pub(super) fn go_on_with_audit(&mut self, step: Step, actor: ActorId, made: Vec<(NodeId, u128)>) {
        let mut due = self.due(step);
        while due.pop_front().is_some_and(|before| before != actor) {}
        let subject = self.table.address(actor).map(|asked| Subject { asked, made });
        self.audit = Some(Audit { step, due, subject });
    }

    /// What the audited actor is asked, if it is on this node: it may not have come to it.
    pub(super) fn audits_on(&self, node: NodeId) -> Option<SupervisorEffect> {
        let audit = self.audit.as_ref()?;
        let actor = audit.subject.as_ref()?.asked.actor;
        (self.table.node_of(actor) == Some(node))
            .then_some(SupervisorEffect::Send(actor, Body::Audit { step: audit.step }))
    }

    fn end_audit(&mut self) {
        if let Some(audit) = &mut self.audit {
            audit.subject = None;
        }
    }

    /// Of some nodes the one with the least to do that is none of those, has room, and is not one on which the actor failed again
    /// and again.
    pub(super) fn elsewhere(&self, actor: ActorId, but: &[NodeId], among: &[NodeId]) -> Option<NodeId> {
        let away = self.away().get(&actor).copied();
        let holdings = self.holdings();
        let others = among.iter().copied().filter(|node| !but.contains(node) && away != Some(*node));
        let roomy = others.filter(|node| holdings[node].0.more(&self.costs, actor) <= holdings[node].1);
        roomy.min_by_key(|node| (holdings[node].0.load, *node))
    }

    fn make_again(&mut self, actor: ActorId, step: Step, node: NodeId) -> Vec<SupervisorEffect> {
        let Some(entry) = self.table.entries.get_mut(&actor) else { return Vec::new() };
        *entry = Entry { node, incarnation: entry.incarnation.next() };
        let asked = Address { actor, incarnation: entry.incarnation };
        let mut made = Vec::new();
        if let Some(subject) = self.audit.as_mut().and_then(|audit| audit.subject.as_mut()) {
            subject.asked = asked;
            made.clone_from(&subject.made);
        }
        // It may stay there; the load is evened out with the commit.
        self.uneven = true;
        let mut effects = self.log(Record::Audit { step, actor, made }, Vec::new());
        effects.extend(self.settle(Vec::new()));
        effects.extend(self.after_sync(vec![SupervisorEffect::Send(actor, Body::Audit { step })]));
        effects
    }

    /// AU-3.
    pub(super) fn differs(&mut self, actor: ActorId, step: Step, made: &[(NodeId, u128)]) -> Vec<SupervisorEffect> {
        let Some(after) = self.checkpoint else {
            let back = Back::Audit { actor, step, made: made.to_vec() };
            self.failed(back.to_string(), Duration::ZERO);
            self.back = Some((back, false));
            return Vec::new();
        };
        let alone = |digest: u128| {
            let is_alone = made.iter().filter(|(_, other)| *other == digest).count() == 1;
            is_alone != planted(Bug::ManyBlamed)
        };
        let wrong = match made.iter().filter(|(_, digest)| alone(*digest)).collect::<Vec<_>>()[..] {
            [(node, _)] => Some(*node),
            [(node, _), _] if planted(Bug::ManyBlamed) => Some(*node),
            _ => None,
        };
        let said: Vec<String> = made.iter().map(|(node, digest)| format!("{digest:032x} on {node}")).collect();
        let verdict =
            wrong.map_or("which is right nobody can say".to_owned(), |node| format!("{node} computes wrongly"));
        let why = format!("what {actor} made in step {step} has hashes {}: {verdict}", said.join(", "));
        // AU-4. One epoch gives the node up and goes back. A crash before it leaves the doubt, on which the next supervisor goes back.
        self.doubt(after);
        let mut effects = self.log(Record::Doubt(after), Vec::new());
        if let Some(node) = wrong.filter(|node| self.forget(*node)) {
            self.failed(format!("{node}: {why}"), Duration::ZERO);
            let epoch = self.table.epoch + 1;
            effects.push(SupervisorEffect::Note(Happening::NodeDead { node: node.0, why: why.clone(), epoch }));
        }
        effects.extend(self.corrupt(why, false));
        effects
    }
}
