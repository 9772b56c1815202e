//! Connections: librdmacm's identifiers and their events.

use super::{Watch, checked, last, nonblocking, pointer};
use rdma_sys::*;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ptr::{null, null_mut};
use std::sync::Arc;

/// Where events of identifiers come.
struct Channel(*mut rdma_event_channel);

// SAFETY: librdmacm locks its channels.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    fn new() -> io::Result<Arc<Self>> {
        // SAFETY: no preconditions.
        let channel = Self(pointer(unsafe { rdma_create_event_channel() }, "rdma_create_event_channel")?);
        // SAFETY: the channel was just made.
        nonblocking(unsafe { (*channel.0).fd })?;
        Ok(Arc::new(channel))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: identifiers hold the channel, so none is left.
        unsafe { rdma_destroy_event_channel(self.0) }
    }
}

/// What happened to an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::rdma) enum CmEventKind {
    AddressResolved,
    RouteResolved,
    ConnectRequest,
    Established,
    /// It cannot be, or is no more.
    Ended(&'static str),
    /// Of no interest.
    Other,
}

/// An event, with what came of it.
pub(in crate::rdma) struct CmEvent {
    pub(in crate::rdma) kind: CmEventKind,
    /// Who wants to connect, on a channel of its own.
    pub(in crate::rdma) asking: Option<CmId>,
    /// What it says with that.
    pub(in crate::rdma) said: Vec<u8>,
}

/// An identifier: a listener, or an end of a connection, with a channel of its own.
pub(in crate::rdma) struct CmId {
    raw: *mut rdma_cm_id,
    channel: Arc<Channel>,
}

// SAFETY: an identifier may be used by any thread.
unsafe impl Send for CmId {}
// SAFETY: its calls are made by RDMA's thread alone; others hold it only so that it lives.
unsafe impl Sync for CmId {}

impl CmId {
    pub(in crate::rdma) fn new() -> io::Result<Self> {
        let channel = Channel::new()?;
        let mut raw = null_mut();
        // SAFETY: the channel lives as long as the identifier, which holds it.
        checked(
            unsafe { rdma_create_id(channel.0, &mut raw, null_mut(), rdma_port_space::RDMA_PS_TCP) },
            "rdma_create_id",
        )?;
        Ok(Self { raw, channel })
    }

    pub(super) fn raw(&self) -> *mut rdma_cm_id {
        self.raw
    }

    /// The device's context, once an address is bound or resolved to one.
    pub(super) fn context(&self) -> Option<*mut ibv_context> {
        // SAFETY: the identifier lives.
        let context = unsafe { (*self.raw).verbs };
        (!context.is_null()).then_some(context)
    }

    /// The device's name, once an address is bound or resolved to one.
    pub(in crate::rdma) fn device(&self) -> Option<String> {
        let context = self.context()?;
        // SAFETY: a context has a device, and that has a name that ends in zero.
        let name = unsafe { std::ffi::CStr::from_ptr(ibv_get_device_name((*context).device)) };
        Some(name.to_string_lossy().into_owned())
    }

    /// To be waited for before [`Self::event`].
    pub(in crate::rdma) fn watch(&self) -> io::Result<Watch> {
        // SAFETY: the channel lives as long as the identifier.
        Watch::new(unsafe { (*self.channel.0).fd })
    }

    pub(in crate::rdma) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let mut storage = storage(address);
        // SAFETY: the address is whole, and copied by the call.
        checked(unsafe { rdma_bind_addr(self.raw, (&raw mut storage).cast()) }, "rdma_bind_addr")
    }

    /// Listens; gives the port.
    pub(in crate::rdma) fn listen(&self, backlog: i32) -> io::Result<u16> {
        // SAFETY: the identifier lives.
        checked(unsafe { rdma_listen(self.raw, backlog) }, "rdma_listen")?;
        // SAFETY: as above.
        Ok(u16::from_be(unsafe { rdma_get_src_port(self.raw) }))
    }

    pub(in crate::rdma) fn resolve_address(&self, to: SocketAddr, timeout_ms: i32) -> io::Result<()> {
        let mut storage = storage(to);
        // SAFETY: the address is whole, and copied by the call.
        let result = unsafe { rdma_resolve_addr(self.raw, null_mut(), (&raw mut storage).cast(), timeout_ms) };
        checked(result, "rdma_resolve_addr")
    }

    pub(in crate::rdma) fn resolve_route(&self, timeout_ms: i32) -> io::Result<()> {
        // SAFETY: the identifier lives.
        checked(unsafe { rdma_resolve_route(self.raw, timeout_ms) }, "rdma_resolve_route")
    }

    /// Connects, once there is a queue pair, and says something with that.
    pub(in crate::rdma) fn connect(&self, say: &[u8]) -> io::Result<()> {
        let mut parameters = parameters(say);
        // SAFETY: the parameters point to what lives during the call.
        checked(unsafe { rdma_connect(self.raw, &mut parameters) }, "rdma_connect")
    }

    /// Accepts who asked, once there is a queue pair.
    pub(in crate::rdma) fn accept(&self) -> io::Result<()> {
        let mut parameters = parameters(&[]);
        // SAFETY: as for connecting.
        checked(unsafe { rdma_accept(self.raw, &mut parameters) }, "rdma_accept")
    }

    /// Refuses who asked.
    pub(in crate::rdma) fn reject(&self) {
        // SAFETY: the identifier lives. Who has gone needs no refusal.
        let _ = unsafe { rdma_reject(self.raw, null(), 0) };
    }

    /// Lets lost packets be sent again sooner. iWARP has no such thing: TCP does it there.
    pub(super) fn hurry(&self) {
        let (level, option) = ACK_TIMEOUT_OPTION;
        let mut value = ACK_TIMEOUT;
        // SAFETY: the option is one byte, copied by the call.
        let _ = unsafe { rdma_set_option(self.raw, level, option, (&raw mut value).cast(), 1) };
    }

    pub(in crate::rdma) fn disconnect(&self) {
        // SAFETY: the identifier lives. What is not connected needs no end.
        let _ = unsafe { rdma_disconnect(self.raw) };
    }

    /// The next event, if there is one.
    pub(in crate::rdma) fn event(&self) -> io::Result<Option<CmEvent>> {
        let mut raw = null_mut();
        // SAFETY: the channel lives; an event is acknowledged once, below, after the last look at it.
        if unsafe { rdma_get_cm_event(self.channel.0, &mut raw) } != 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(last("rdma_get_cm_event")) };
        }
        // SAFETY: the call gave an event.
        let event = unsafe { &*raw };
        let kind = kind(event.event);
        let (mut said, mut asker) = (Vec::new(), null_mut());
        if kind == CmEventKind::ConnectRequest {
            asker = event.id;
            // SAFETY: a request of a connection has connection's parameters, which say how many bytes there are.
            let given = unsafe { event.param.conn };
            if !given.private_data.is_null() {
                // SAFETY: as above.
                let bytes = unsafe {
                    std::slice::from_raw_parts(given.private_data.cast::<u8>(), given.private_data_len.into())
                };
                said = bytes.to_vec();
            }
        }
        // SAFETY: not acknowledged yet.
        checked(unsafe { rdma_ack_cm_event(raw) }, "rdma_ack_cm_event")?;
        let asking = if asker.is_null() { None } else { Some(self.adopt(asker)?) };
        Ok(Some(CmEvent { kind, asking, said }))
    }

    /// Gives who asks a channel of its own.
    fn adopt(&self, raw: *mut rdma_cm_id) -> io::Result<Self> {
        let mut id = Self { raw, channel: Arc::clone(&self.channel) };
        let channel = Channel::new()?;
        // SAFETY: both live.
        checked(unsafe { rdma_migrate_id(raw, channel.0) }, "rdma_migrate_id")?;
        id.channel = channel;
        Ok(id)
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        // SAFETY: its queue pair and what was made of its context hold it, so they are gone; all events are acknowledged.
        unsafe { rdma_destroy_id(self.raw) };
    }
}

fn kind(event: rdma_cm_event_type::Type) -> CmEventKind {
    use rdma_cm_event_type as t;
    match event {
        t::RDMA_CM_EVENT_ADDR_RESOLVED => CmEventKind::AddressResolved,
        t::RDMA_CM_EVENT_ROUTE_RESOLVED => CmEventKind::RouteResolved,
        t::RDMA_CM_EVENT_CONNECT_REQUEST => CmEventKind::ConnectRequest,
        t::RDMA_CM_EVENT_ESTABLISHED => CmEventKind::Established,
        t::RDMA_CM_EVENT_ADDR_ERROR => CmEventKind::Ended("no device leads to its address"),
        t::RDMA_CM_EVENT_ROUTE_ERROR => CmEventKind::Ended("no route leads to its address"),
        t::RDMA_CM_EVENT_CONNECT_ERROR => CmEventKind::Ended("the connection could not be made"),
        t::RDMA_CM_EVENT_UNREACHABLE => CmEventKind::Ended("the other side does not answer"),
        t::RDMA_CM_EVENT_REJECTED => CmEventKind::Ended("the other side refused"),
        t::RDMA_CM_EVENT_DISCONNECTED => CmEventKind::Ended("the other side disconnected"),
        t::RDMA_CM_EVENT_DEVICE_REMOVAL => CmEventKind::Ended("the device was removed"),
        _ => CmEventKind::Other,
    }
}

/// For how long a device waits for an acknowledgement, as a power of two of 4.096 us: 34 ms. The default is half a second.
const ACK_TIMEOUT: u8 = 13;
/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_ACK_TIMEOUT` of rdma_cma.h, which the bindings lack.
const ACK_TIMEOUT_OPTION: (i32, i32) = (0, 3);
/// Retries that the device makes by itself before a request fails: the most that there are.
const RETRIES: u8 = 7;

fn parameters(say: &[u8]) -> rdma_conn_param {
    // SAFETY: all fields are numbers or a pointer that may be null.
    let mut parameters: rdma_conn_param = unsafe { std::mem::zeroed() };
    parameters.private_data = say.as_ptr().cast();
    parameters.private_data_len = say.len() as u8;
    parameters.responder_resources = 1;
    parameters.initiator_depth = 1;
    parameters.retry_count = RETRIES;
    // A receive buffer is always there (RD-2).
    parameters.rnr_retry_count = RETRIES;
    parameters
}

/// An address as the C library has it.
fn storage(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: all fields are numbers.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    match address {
        SocketAddr::V4(v4) => {
            let at = (&raw mut storage).cast::<libc::sockaddr_in>();
            // SAFETY: the storage is large enough for, and aligned as, any address.
            let at = unsafe { &mut *at };
            at.sin_family = libc::AF_INET as libc::sa_family_t;
            at.sin_port = v4.port().to_be();
            at.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
        }
        SocketAddr::V6(v6) => {
            let at = (&raw mut storage).cast::<libc::sockaddr_in6>();
            // SAFETY: as above.
            let at = unsafe { &mut *at };
            at.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            at.sin6_port = v6.port().to_be();
            at.sin6_addr.s6_addr = v6.ip().octets();
            at.sin6_scope_id = v6.scope_id();
        }
    }
    storage
}

/// Addresses of this machine that belong to an RDMA device.
pub(in crate::rdma) fn addresses() -> io::Result<Vec<IpAddr>> {
    // Without a device librdmacm would complain on the program's output.
    if std::fs::read_dir("/sys/class/infiniband").map_or(true, |mut devices| devices.next().is_none()) {
        return Ok(Vec::new());
    }
    let mut list = null_mut();
    // SAFETY: the list is freed below, after the last look at it.
    checked(unsafe { libc::getifaddrs(&mut list) }, "getifaddrs")?;
    let (mut all, mut at) = (Vec::new(), list);
    while !at.is_null() {
        // SAFETY: the list's entries live until it is freed.
        let entry = unsafe { &*at };
        all.extend(ip(entry.ifa_addr));
        at = entry.ifa_next;
    }
    // SAFETY: got above, and freed once.
    unsafe { libc::freeifaddrs(list) };
    all.sort_unstable();
    all.dedup();
    all.retain(|ip| has_device(*ip).unwrap_or(false));
    Ok(all)
}

fn has_device(ip: IpAddr) -> io::Result<bool> {
    if ip.is_loopback() {
        return Ok(false);
    }
    let id = CmId::new()?;
    id.bind(SocketAddr::new(ip, 0))?;
    Ok(id.context().is_some())
}

fn ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: an address has a family, which says what else it has.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: as above.
            let v4 = unsafe { (*address.cast::<libc::sockaddr_in>()).sin_addr.s_addr };
            Some(Ipv4Addr::from(v4.to_ne_bytes()).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { (*address.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr };
            let v6 = Ipv6Addr::from(v6);
            (!v6.is_unicast_link_local()).then_some(v6.into())
        }
        _ => None,
    }
}
