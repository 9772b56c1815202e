//! The contracts, as the simulator checks them: a file each. They are stated over what can be seen from outside the cores, so
//! that a bug in a core cannot hide itself.

pub(super) mod c1;
pub(super) mod c2;
pub(super) mod c3;
pub(super) mod c4;
pub(super) mod c5;
pub(super) mod c6;

/// A broken contract and what broke it.
pub(super) type Broken = (&'static str, String);
