//! The job of Everstep: actors and the protocols that they follow.
//!
//! Each protocol is a pure core (`stage`, `expert`, `host`, `reducer`, `router`, `supervisor`, `keeper`)
//! that takes events and gives effects. The shells carry effects out with ractor, QUIC and files; the
//! simulator carries the same effects out with simulated ones.

mod audit;
mod coded;
mod compute;
mod config;
mod control;
mod costs;
mod data;
mod effect;
mod expert;
mod fingerprint;
mod hang;
mod holding;
mod host;
mod ids;
mod keeper;
mod message;
mod outbox;
mod pieces;
mod plant;
mod rates;
mod reducer;
mod root;
mod router;
mod schedule;
mod shared;
mod shell;
pub mod sim;
mod spec;
mod stage;
mod stored;
mod storing;
mod supervisor;
mod table;
mod tally;
#[cfg(test)]
mod testing;
mod tokens;
mod wire;
mod worker;

pub use compute::{Job, Outcome, RowsAgain, run};
pub use config::{Config, ConfigError, DataConfig, EvalConfig, SourceConfig};
pub use control::{AdminRequest, BadWire, Control, Disturbed};
pub use data::{Corpus, TooShort};
pub use effect::{Core, Effect, Event};
pub use everstep_checkpoint::Trouble;
pub use fingerprint::root as fingerprint_root;
pub use ids::{ActorId, Address, Incarnation, NodeId, SUPERVISOR_NODE, Step, UnknownActor};
pub use message::{Body, Commit, Envelope};
pub use plant::Bug;
pub use reducer::first_state;
pub use shell::{
    AnyError, ControlPlane, MetricsLine, NodeEnd, NodeOptions, RunFolder, RunIdentity, Seat, SupervisorEnd,
    SupervisorOptions, Took, find_supervisor, hash_hex, machine, milliseconds, new_name, run_node, run_supervisor,
    verify_tokens,
};
pub use spec::{JobSpec, Layout, OptimizerSpec};
pub use stored::{state_of, stored};
pub use supervisor::{
    CommitRecord, Happening, Limit, Nodes, Outlook, Phases, Record, Report, Supervisor, SupervisorEffect,
    SupervisorEvent,
};
pub use table::{Entry, NodeInfo, Table};
pub use tally::Operations;
pub use tokens::{SourceInfo, Tokens, token_width};
pub use wire::{Unit, WireError};
