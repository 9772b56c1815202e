//! The way back to the newest checkpoint: what sends a job there, and what waits until it is known where that is (SU-5, SU-9).

use super::commit::CommitError;
use super::steps::compared;
use super::{CORRUPTION_WINDOW, CORRUPTIONS_MAX, Happening, Record, Supervisor, SupervisorEffect, count_within};
use crate::ids::{ActorId, NodeId, Step};
use crate::plant::{Bug, planted};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

/// What sends a job back (SU-9).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Back {
    /// For this reason.
    For(String),
    /// Of what an actor made in a step there are different hashes.
    Audit { actor: ActorId, step: Step, made: Vec<(NodeId, u128)> },
}

impl fmt::Display for Back {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(why) => f.write_str(why),
            Self::Audit { actor, step, .. } => write!(f, "what {actor} made in step {step} has several hashes"),
        }
    }
}

impl Supervisor {
    /// The store was read for the first time (SU-9). The event of the newest checkpoint may have been lost with the life before.
    pub(super) fn found(
        &mut self,
        newest: Result<Step, String>,
        mut reported: BTreeMap<Step, String>,
    ) -> Vec<SupervisorEffect> {
        self.unreadable = newest.as_ref().err().cloned();
        let step = newest.unwrap_or(0);
        self.checkpoint = Some(step);
        reported.retain(|step, _| self.doubted.is_none_or(|after| *step <= after));
        if let Some(why) = self.unreadable.clone().filter(|_| planted(Bug::EndedTooSoon)) {
            return self.finish(Err(why));
        }
        let stored = (step > 0).then_some(SupervisorEffect::Note(Happening::CheckpointStored { step }));
        let mut effects: Vec<_> = stored.into_iter().collect();
        // If the job goes back all since are done again, and compared again.
        if !self.table.goes_back() && self.back.is_none() {
            effects.extend(compared(&reported));
        }
        for (step, fingerprint) in reported {
            self.reported.entry(step).or_insert(fingerprint);
        }
        // The checkpoint that reducers were to start from turned out to be damaged.
        let damaged = self.table.goes_back() && (self.table.base > step || self.unreadable.is_some());
        match self.back.take() {
            Some((Back::Audit { actor, step, made }, _)) => effects.extend(self.differs(actor, step, &made)),
            Some((Back::For(why), _)) => {
                let note = self.begin_from(step, why);
                effects.extend(self.publish(Vec::new()));
                effects.push(SupervisorEffect::Note(note));
            }
            None if damaged => effects.extend(self.go_back("its checkpoint is not readable any more".to_owned())),
            None => effects.extend(self.end_if_over()),
        }
        effects
    }

    /// To the newest checkpoint, in an epoch of its own.
    fn go_back(&mut self, why: String) -> Vec<SupervisorEffect> {
        let Some(note) = self.roll_back(why) else { return Vec::new() };
        let mut effects = self.publish(Vec::new());
        effects.push(SupervisorEffect::Note(note));
        effects
    }

    /// Everybody gets a new life at the newest checkpoint, once that is known (SU-9).
    pub(super) fn roll_back(&mut self, why: String) -> Option<Happening> {
        if self.back.is_some() {
            return None;
        }
        self.failed(why.clone(), Duration::ZERO);
        let unread = planted(Bug::CheckpointNotAwaited).then_some(0);
        // Nobody has trained on it since: it is what they go back to, unless it is damaged.
        let base = self.table.goes_back().then_some(self.table.base);
        match self.checkpoint.or(unread).or(base) {
            Some(to_step) => Some(self.begin_from(to_step, why)),
            None => {
                self.back = Some((Back::For(why), false));
                None
            }
        }
    }

    /// The wish to go back outlives this supervisor: the next one may not see what it saw.
    pub(super) fn log_back(&mut self) -> Vec<SupervisorEffect> {
        let Some((back, logged @ false)) = &mut self.back else { return Vec::new() };
        *logged = true;
        let record = match back {
            Back::For(why) => Record::Back(why.clone()),
            Back::Audit { actor, step, made } => Record::Audit { step: *step, actor: *actor, made: made.clone() },
        };
        self.log(record, Vec::new())
    }

    /// Everybody gets a new life at the checkpoint of this step.
    pub(super) fn begin_from(&mut self, to_step: Step, why: String) -> Happening {
        self.table.base = to_step;
        self.table.primaries.fill(None);
        for (actor, entry) in &mut self.table.entries {
            if !matches!(actor, ActorId::Supervisor | ActorId::Keeper) && !planted(Bug::LivesKeptGoingBack) {
                entry.incarnation = entry.incarnation.next();
            }
        }
        self.place(true);
        // The checkpoint's own commit stays: its step may not be reported yet.
        self.last = self.last.filter(|last| last.commit.step == to_step && !planted(Bug::LineForgotten));
        self.audit = None;
        // A commit whose record is not synced yet is not announced any more: the job is before it now.
        for held in &mut self.held {
            held.retain(|effect| !matches!(effect, SupervisorEffect::Send(..)));
        }
        self.commit.restore(to_step, BTreeSet::new());
        Happening::RolledBack { to_step, epoch: self.table.epoch + 1, why }
    }

    /// A step cannot be committed, its states differ, or one changed by itself, and gradients may have been made from it: all
    /// go back to the newest checkpoint, and the steps since are done again. What is found too often ends the job.
    pub(super) fn refused(&mut self, error: &CommitError) -> Vec<SupervisorEffect> {
        self.corrupt(error.to_string(), matches!(error, CommitError::Unbalanced { .. }))
    }

    /// Something is corrupt: the job goes back to the newest checkpoint, or ends if that was so too often or is of no use.
    pub(super) fn corrupt(&mut self, why: String, ends: bool) -> Vec<SupervisorEffect> {
        if self.back.is_some() {
            return Vec::new();
        }
        let times = count_within(&mut self.corruptions, self.now, CORRUPTION_WINDOW);
        if ends || times > CORRUPTIONS_MAX {
            return self.finish(Err(why));
        }
        let mut effects = vec![SupervisorEffect::Note(Happening::Corrupted { why: why.clone() })];
        effects.extend(self.go_back(why));
        effects
    }
}
