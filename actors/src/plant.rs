//! Bugs that the simulator plants in the cores, to prove that it would find them.
//!
//! Only test builds and those with the feature `plant` hold them: in any other [`planted`] is a constant. A bug is planted in
//! one thread, that of the simulated world.

use std::fmt;
use std::str::FromStr;

macro_rules! bugs {
    ($($(#[$doc:meta])+ $bug:ident = $name:literal,)+) => {
        /// A bug.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Bug { $($(#[$doc])+ $bug,)+ }

        impl Bug {
            /// All of them, with their names.
            pub const ALL: &[(Self, &str)] = &[$((Self::$bug, $name),)+];
        }
    };
}

bugs! {
    /// Messages of and to replaced actors are taken.
    FenceSkipped = "fence-skipped",
    /// Messages to replaced actors are.
    ReceiverUnfenced = "receiver-unfenced",
    /// A message of a life that is not announced yet is refused, not held.
    EarlyMessageRefused = "early-message-refused",
    /// A new life of a receiver gets all that was kept for it but the last.
    OutboxEntryForgotten = "outbox-entry-forgotten",
    /// What was sent to an actor is not kept until the commit.
    OutboxForgottenEarly = "outbox-forgotten-early",
    /// What was sent to an actor is kept for ever.
    OutboxNeverFreed = "outbox-never-freed",
    /// A new copy of a shard does not get what the others got.
    NewCopyNotServed = "new-copy-not-served",
    /// A new life of an expert does not get the last rows that were made for it.
    RecipeForgotten = "recipe-forgotten",
    /// An expert does not answer a stage's new life again.
    AnswerNotMadeAgain = "answer-not-made-again",
    /// An expert computes rows again that it has computed.
    ComputedTwice = "computed-twice",
    /// An expert forgets rows that come before its weights.
    EarlyRowsForgotten = "early-rows-forgotten",
    /// A stage begins its step again when its weights come again.
    BegunAgain = "begun-again",
    /// A second copy of a sum is counted.
    ContributionTwice = "contribution-twice",
    /// Lanes are added in the order in which they came.
    ArrivalOrderSum = "arrival-order-sum",
    /// A state is given to a new life without another look at it.
    LateStateUnchecked = "late-state-unchecked",
    /// A commit is announced before its record is synced.
    AcknowledgedBeforeSynced = "acknowledged-before-synced",
    /// A new supervisor overlooks the last commit of its log.
    LastCommitOverlooked = "last-commit-overlooked",
    /// When an actor fails, all of its node get a new life.
    NodeRestarted = "node-restarted",
    /// Actors that live are moved to a node as soon as it comes.
    MovedTooSoon = "moved-too-soon",
    /// A failed actor gets no new life.
    FailureOverlooked = "failure-overlooked",
    /// A silent node is not given up.
    SilenceOverlooked = "silence-overlooked",
    /// A copy that has no state may become the primary.
    StatelessElected = "stateless-elected",
    /// A copy that has the state does not become the primary.
    MirrorOverlooked = "mirror-overlooked",
    /// A step is said to be in as many copies as are wanted.
    CopiesOverstated = "copies-overstated",
    /// A step is committed in fewer domains than are waited for.
    ThinCommitted = "thin-committed",
    /// Actors keep their lives when the job goes back to a checkpoint.
    LivesKeptGoingBack = "lives-kept-going-back",
    /// A node is let go while actors live on it.
    ReleasedWithActors = "released-with-actors",
    /// A checkpoint is published whatever was stored.
    SnapshotNotCompared = "snapshot-not-compared",
    /// A checkpoint is published when one shard of it is stored.
    PublishedIncomplete = "published-incomplete",
    /// A new supervisor takes the newest checkpoint without a look at it.
    DamageOverlooked = "damage-overlooked",
    /// Damaged checkpoints end a job whatever its copies hold.
    EndedTooSoon = "ended-too-soon",
    /// A new supervisor begins from nothing where there is a checkpoint.
    CheckpointForgotten = "checkpoint-forgotten",
    /// The step of the checkpoint to which a job goes back is not reported if it was not before.
    LineForgotten = "line-forgotten",
    /// A step that is done again is reported again.
    ReportedAgain = "reported-again",
    /// A supervisor that has not read its store yet takes it for empty.
    CheckpointNotAwaited = "checkpoint-not-awaited",
    /// A store that fails for a moment ends the job.
    FailureNotTriedAgain = "failure-not-tried-again",
    /// An audit that finds a difference takes those who agree for wrong.
    ManyBlamed = "many-blamed",
    /// A spare is not asked to decide an audit.
    SpareNotAsked = "spare-not-asked",
    /// A session forgets what was not acknowledged when its link breaks.
    LostAtReconnect = "lost-at-reconnect",
    /// A session delivers what comes again.
    DeliveredAgain = "delivered-again",
}

#[cfg(any(test, feature = "plant"))]
mod thread {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Whether it is planted in this thread.
    pub(crate) fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }

    /// Runs something with a bug planted, or with none.
    pub(crate) fn with<R>(bug: Option<Bug>, run: impl FnOnce() -> R) -> R {
        struct Before(Option<Bug>);
        impl Drop for Before {
            fn drop(&mut self) {
                PLANTED.set(self.0);
            }
        }
        let _before = Before(PLANTED.replace(bug));
        run()
    }
}

#[cfg(not(any(test, feature = "plant")))]
mod thread {
    use super::Bug;

    /// No bug is.
    pub(crate) const fn planted(_: Bug) -> bool {
        false
    }

    /// Runs something; there is no bug to plant.
    pub(crate) fn with<R>(_: Option<Bug>, run: impl FnOnce() -> R) -> R {
        run()
    }
}

pub(crate) use thread::{planted, with};

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::ALL.iter().find(|(bug, _)| bug == self);
        f.write_str(named.map_or("", |(_, name)| name))
    }
}

impl FromStr for Bug {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.iter().find(|(_, name)| *name == text);
        named.map(|(bug, _)| *bug).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(_, name)| *name).collect();
            format!("no bug is called '{text}'; there are {}", names.join(", "))
        })
    }
}
