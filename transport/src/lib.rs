//! Bytes between the processes of a job. Knows no actor and no model.
//!
//! From the bottom: a [`Link`] carries frames and may break; a session (pure core: [`Session`]) makes an
//! ordered, exactly-once, flow-controlled stream of units on two lanes of any number of links; a
//! [`Hub`] keeps all sessions of a process, over QUIC. Beside them, a [`Call`] is a request with one answer.

mod calls;
mod codec;
mod credentials;
mod disturb;
mod hub;
mod link;
mod message;
mod quic;
mod session;

pub use calls::{CALL_MAX, Call, Caller};
pub use codec::FrameError;
pub use credentials::{Credentials, CredentialsError};
pub use disturb::Disturbance;
pub use hub::{Hub, HubEvent, SEND_QUEUE};
pub use link::Link;
pub use message::{Assembler, FRAGMENT_MAX, Fragment, HEADER_MAX, Message, MessageError};
pub use quic::{LINK_BYTES, Peer, QuicError};
pub use session::{Frame, Lane, Resume, Session, SessionEffect, SessionError};
