//! Bytes between the processes of a job. Knows no actor and no model.
//!
//! From the bottom: a [`Link`] carries frames and may break; a session (pure core: [`Session`]) makes an
//! ordered, exactly-once, flow-controlled stream of units on two lanes of any number of links; a
//! [`Hub`] keeps all sessions of a process. Two processes meet over QUIC, and their session stays there, or goes over RDMA as long as that
//! works: their connection's choice. Beside them, a [`Call`] is a request with one answer.

mod calls;
mod choice;
mod codec;
mod connection;
mod credentials;
mod disturb;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod hub;
mod link;
mod liveness;
mod message;
mod quic;
#[cfg(not(feature = "rdma"))]
#[path = "no_rdma.rs"]
mod rdma;
#[cfg(feature = "rdma")]
mod rdma;
mod session;
mod side;
mod socket;

pub use calls::{CALL_MAX, Call, Caller};
pub use choice::Way;
pub use codec::FrameError;
pub use credentials::{Credentials, CredentialsError};
pub use disturb::Disturbance;
pub use hub::{Hub, HubEvent, SEND_QUEUE};
pub use link::Link;
pub use message::{
    Assembler, FRAGMENT_MAX, Fragment, HEADER_MAX, Message, MessageError, Parts, REGIONS_MAX, WORDS_MAX,
};
pub use quic::{LINK_BYTES, Peer, QuicError};
pub use session::{Effects, Frame, Lane, Resume, Session, SessionBug, SessionEffect, SessionError};
