//! A build without the feature `rdma`: peers hear that, and sessions stay with QUIC.

use crate::connection::Trial;
use crate::hub::Refusals;
use crate::side::Token;
use std::future::Ready;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

/// There is none.
pub(crate) enum Rdma {}

impl Rdma {
    pub(crate) fn start(_: Refusals) -> io::Result<Arc<Self>> {
        Err(io::Error::other("this program was built without RDMA"))
    }

    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        match *self {}
    }

    pub(crate) fn break_links(&self) {
        match *self {}
    }

    pub(crate) fn expect(&self, _: Token) -> Ready<io::Result<Trial>> {
        match *self {}
    }

    pub(crate) fn connect(&self, _: Vec<SocketAddr>, _: Token) -> Ready<io::Result<Trial>> {
        match *self {}
    }
}
