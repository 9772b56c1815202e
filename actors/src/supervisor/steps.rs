//! The supervisor's way through the steps: reports of reducers, commits, checkpoints, the end.

use super::commit::Prepared;
use super::{Happening, Record, Report, Supervisor, SupervisorEffect};
use crate::ids::{ActorId, Address, NodeId, Step};
use crate::message::Body;
use crate::plant::{Bug, planted};
use crate::tally::Operations;
use everstep_kernels::Tensor;
use std::collections::BTreeMap;

/// What earlier lives compared may be stored again.
pub(super) fn compared(reported: &BTreeMap<Step, String>) -> impl Iterator<Item = SupervisorEffect> + use<> {
    reported.clone().into_iter().map(|(step, fingerprint)| SupervisorEffect::Verified(step, fingerprint))
}

impl Supervisor {
    pub(super) fn message(&mut self, from: Address, body: Body<Tensor>) -> Vec<SupervisorEffect> {
        if let (Body::Ready, Some(recovery)) = (&body, &mut self.recovery) {
            recovery.ready(self.now, from);
        }
        if let Body::Audited { step, digest } = body {
            let present = self.table.address(from.actor) == Some(from);
            return if present { self.audited(from, step, digest) } else { Vec::new() };
        }
        let ActorId::Reducer { shard, replica } = from.actor else { return Vec::new() };
        if self.table.address(from.actor) != Some(from) {
            return Vec::new();
        }
        let mut effects = Vec::new();
        match body {
            Body::Prepared { step, norm, losses, samples, digest } => {
                self.commit.prepared(shard, replica, Prepared { step, norm, losses, samples, digest });
            }
            Body::Applied { step, sums } => {
                if let Err(e) = self.commit.applied(shard, replica, step, sums) {
                    return self.refused(&e);
                }
                if self.can_elect() {
                    effects.extend(self.settle(Vec::new()));
                }
            }
            Body::Corrupt(found) => {
                let error = self.commit.changed(shard, replica, found);
                return self.refused(&error);
            }
            Body::Stateless => {
                self.commit.out_of_sync(from.actor);
                let before = self.table.primaries.clone();
                let note = self.elect();
                if self.table.primaries != before {
                    effects.extend(self.publish(Vec::new()));
                }
                effects.extend(note.map(SupervisorEffect::Note));
            }
            Body::Hidden { .. }
            | Body::Gradient { .. }
            | Body::Rows { .. }
            | Body::Answer { .. }
            | Body::Sums { .. }
            | Body::Weights { .. }
            | Body::Fetch { .. }
            | Body::Ready
            | Body::Audit { .. }
            | Body::Audited { .. }
            | Body::State { .. }
            | Body::Commit(_)
            | Body::Snapshot { .. }
            | Body::SnapshotKept { .. } => {}
        }
        effects
    }

    /// Reports and commits what can be.
    pub(super) fn decide(&mut self) -> Vec<SupervisorEffect> {
        if self.finished {
            return Vec::new();
        }
        self.thin = None;
        if self.back.is_some() {
            return Vec::new();
        }
        let mut effects = self.report();
        if self.finished || self.table.goes_back() {
            return effects;
        }
        if self.spec.thin_waits && self.commit.is_ready() && !planted(Bug::ThinCommitted) {
            self.thin = Some(self.commit.domains(&self.table)).filter(|domains| *domains <= self.spec.mirrors);
            if self.thin.is_some() {
                return effects;
            }
        }
        if self.commit.is_ready()
            && let Some(audits) = self.audit()
        {
            effects.extend(audits);
            return effects;
        }
        let commit = match self.commit.decide(&self.table) {
            Ok(Some(commit)) => commit,
            Ok(None) => return effects,
            Err(e) => {
                effects.extend(self.refused(&e));
                return effects;
            }
        };
        self.last = Some(commit);
        // Primaries first: a node's stages wait for what they hand out, nobody for what their mirrors do on the same threads.
        let mut copies: Vec<ActorId> = self.reducers().collect();
        let table = &self.table;
        copies
            .sort_by_key(|copy| matches!(copy, ActorId::Reducer { shard, .. } if table.primary(*shard) != Some(*copy)));
        let send = copies.into_iter().map(|to| SupervisorEffect::Send(to, Body::Commit(commit.commit))).collect();
        effects.extend(self.log(Record::Commit(commit), send));
        if commit.commit.skipped {
            let why = "the gradient's norm is not finite".to_owned();
            effects.push(SupervisorEffect::Note(Happening::Skipped { step: commit.commit.step, why }));
        }
        if let Some(recovery) = &mut self.recovery {
            recovery.replayed(self.now);
        }
        effects.extend(self.even_out(commit.commit.step));
        effects
    }

    /// Moves actors to nodes that came during the step that is committed now, and from those that leave (SU-6).
    fn even_out(&mut self, committed: Step) -> Vec<SupervisorEffect> {
        // A node that says nothing, or does not reach the others, may never do so.
        let uneven = self.uneven && self.membership.all_heard() && self.links.all_up(&self.working());
        if committed == self.spec.steps || !(uneven || self.is_moving()) {
            return Vec::new();
        }
        self.uneven &= !uneven;
        let before = self.table.entries.len();
        let moved = self.place(true);
        if moved.is_empty() && self.table.entries.len() == before {
            return Vec::new();
        }
        let mut effects = self.settle(Vec::new());
        if moved.is_empty() {
            return effects;
        }
        let actors = moved.iter().map(ToString::to_string).collect();
        effects.push(SupervisorEffect::Note(Happening::Moved { epoch: self.table.epoch, actors }));
        effects
    }

    /// A record is on disk, and these effects may be seen.
    pub(super) fn synced(&mut self, mut effects: Vec<SupervisorEffect>) -> Vec<SupervisorEffect> {
        let Some(recovery) = &mut self.recovery else { return effects };
        if effects.iter().any(|e| matches!(e, SupervisorEffect::Announce(_))) {
            recovery.announced(self.now);
        }
        let committed = |e: &SupervisorEffect| match e {
            SupervisorEffect::Send(_, Body::Commit(commit)) => Some(commit.step),
            _ => None,
        };
        let Some(step) = effects.iter().find_map(committed) else { return effects };
        if let Some(microseconds) = recovery.committed(self.now) {
            effects.push(SupervisorEffect::Note(Happening::Recovered {
                step,
                milliseconds: microseconds.sum() / 1000,
                causes: recovery.take_causes(),
                lives: recovery.lives,
                microseconds,
            }));
            self.recovery = None;
        }
        effects
    }

    /// Reports the newest committed step once every shard has applied it.
    fn report(&mut self) -> Vec<SupervisorEffect> {
        let Some(fingerprint) = self.commit.take_fingerprint() else { return Vec::new() };
        let step = self.commit.committed();
        let mut effects = Vec::new();
        let before = self.reported.get(&step).filter(|_| !planted(Bug::ReportedAgain));
        match (before, self.last) {
            (Some(before), _) if *before != fingerprint => {
                let why = format!("step {step} was done again and has fingerprint {fingerprint}, not {before}");
                return self.finish(Err(why));
            }
            (None, Some(commit)) if commit.commit.step == step => {
                let (mut redone, mut recipes) = (0, 0);
                let since = |(node, [done, told]): (&NodeId, &mut [Operations; 2])| {
                    let since = done.since(std::mem::replace(told, *done));
                    (redone, recipes) = (redone + since.redone, recipes + since.recipes);
                    (*node, since.work)
                };
                let operations = self.work.iter_mut().map(since).collect();
                let (fingerprint, epoch) = (fingerprint.clone(), self.table.epoch);
                let report = Report { commit, fingerprint, epoch, operations, redone, recipes };
                effects.push(SupervisorEffect::Report(report));
            }
            (Some(_) | None, _) => {}
        }
        effects.push(SupervisorEffect::Verified(step, fingerprint.clone()));
        self.reported.insert(step, fingerprint);
        effects.extend(self.end_if_over());
        effects
    }

    /// The job is over when its last step is reported, and stored.
    pub(super) fn end_if_over(&mut self) -> Vec<SupervisorEffect> {
        let last = self.spec.steps;
        let is_over = self.committed() == last && self.checkpoint == Some(last) && self.reported.contains_key(&last);
        if is_over { self.finish(Ok(())) } else { Vec::new() }
    }

    pub(super) fn checkpointed(&mut self, step: Step) -> Vec<SupervisorEffect> {
        // Of what the job goes back from: it is put aside.
        if self.table.goes_back() && step > self.table.base {
            return Vec::new();
        }
        let newest = self.checkpoint.unwrap_or(0).max(step);
        self.checkpoint = Some(newest);
        self.unreadable = None;
        // A step is done again only after the newest checkpoint, or if the job is before it now.
        let floor = newest.min(self.committed());
        self.reported.retain(|s, _| *s >= floor);
        let mut effects = vec![SupervisorEffect::Note(Happening::CheckpointStored { step })];
        effects.extend(self.end_if_over());
        effects
    }
}
