//! Bytes between the processes of a job. Knows no actor and no model.

mod session;

pub use session::{Frame, Lane, Resume, Session, SessionEffect, SessionError};
