//! A queue pair with its completions, and the memory of what is on its way.

use super::cm::CmId;
use super::memory::{Domain, Granted, Key, Lent, Memory};
use super::{Watch, checked, nonblocking, numbered, pointer};
use crate::message::Parts;
use crate::rdma::packet::{PACKET, SlotGrant};
use crate::rdma::protocol::{PACKETS, RECEIVES, WRITES};
use bytes::{Bytes, BytesMut};
use rdma_sys::*;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::CStr;
use std::io;
use std::ptr::null_mut;
use std::sync::Arc;

/// Parts of a write that a device takes at most here; some take fewer.
const PARTS: usize = 8;
/// Shorter parts are copied: that is sooner done than a key is made.
const COPIED: usize = 4096;
/// Completions that are taken at a time.
const BATCH: usize = 32;

/// A request that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::rdma) enum Done {
    /// A packet has gone.
    Sent,
    /// A write is in its place, of that number.
    Placed(u64),
    /// A packet is in this receive buffer, so many bytes.
    Received(usize, usize),
    /// The peer wrote, and this word came with it. The receive buffer was not used.
    Written(usize, u32),
}

/// A connection's queue pair.
pub(in crate::rdma) struct QueuePair {
    id: Arc<CmId>,
    domain: Arc<Domain>,
    completions: *mut ibv_cq,
    channel: *mut ibv_comp_channel,
    sge_max: usize,
    inbox: (Key, Memory),
    outbox: (Key, Memory),
    /// Send buffers that are free.
    free: Vec<usize>,
    /// What is being written, kept until the write has ended.
    lent: BTreeMap<u64, Vec<Lent>>,
    writes: u64,
    /// Completions that were taken off the queue and not given yet.
    taken: VecDeque<(u64, Result<Done, String>)>,
}

// SAFETY: libibverbs locks its objects; the memory is the queue pair's own.
unsafe impl Send for QueuePair {}

/// What a request's number says of it.
const SEND: u64 = 1 << 56;
const WRITE: u64 = 2 << 56;
const RECEIVE: u64 = 3 << 56;
const KINDS: u64 = 0xFF << 56;

impl QueuePair {
    /// Of an identifier whose address is resolved, or that asked; with all receive buffers posted.
    pub(in crate::rdma) fn new(id: CmId) -> io::Result<Self> {
        let context = id.context().ok_or_else(|| io::Error::other("no device leads to its address"))?;
        id.hurry();
        let id = Arc::new(id);
        let domain = Domain::new(&id, context)?;
        // SAFETY: a device's attributes are numbers.
        let mut attributes: ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context lives as long as the identifier.
        checked(unsafe { ibv_query_device(context, &mut attributes) }, "ibv_query_device")?;
        let sge_max = (attributes.max_sge as usize).clamp(1, PARTS);
        let own = |bytes, access| {
            let memory = Memory::new(bytes);
            // SAFETY: the memory is kept with its key, and read and written only as completions allow.
            let key = unsafe { Key::new(&domain, memory.start(), memory.len(), access)? };
            Ok::<_, io::Error>((key, memory))
        };
        let inbox = own(RECEIVES * PACKET, ibv_access_flags::IBV_ACCESS_LOCAL_WRITE)?;
        let outbox = own(PACKETS * PACKET, ibv_access_flags(0))?;
        // SAFETY: the context lives as long as the identifier.
        let channel = pointer(unsafe { ibv_create_comp_channel(context) }, "ibv_create_comp_channel")?;
        let mut pair = Self {
            id,
            domain,
            completions: null_mut(),
            channel,
            sge_max,
            inbox,
            outbox,
            free: (0..PACKETS).collect(),
            lent: BTreeMap::new(),
            writes: 0,
            taken: VecDeque::new(),
        };
        pair.open(context)?;
        Ok(pair)
    }

    fn open(&mut self, context: *mut ibv_context) -> io::Result<()> {
        // SAFETY: the channel was just made.
        nonblocking(unsafe { (*self.channel).fd })?;
        let entries = (RECEIVES + PACKETS + WRITES) as i32;
        // SAFETY: the context and the channel live.
        let queue = unsafe { ibv_create_cq(context, entries, null_mut(), self.channel, 0) };
        self.completions = pointer(queue, "ibv_create_cq")?;
        // SAFETY: all fields are numbers, or pointers that may be null.
        let mut wanted: ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        (wanted.send_cq, wanted.recv_cq) = (self.completions, self.completions);
        wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
        wanted.sq_sig_all = 1;
        wanted.cap.max_send_wr = (PACKETS + WRITES) as u32;
        wanted.cap.max_recv_wr = RECEIVES as u32;
        wanted.cap.max_send_sge = self.sge_max as u32;
        wanted.cap.max_recv_sge = 1;
        // SAFETY: all of it lives.
        checked(unsafe { rdma_create_qp(self.id.raw(), self.domain.raw(), &mut wanted) }, "rdma_create_qp")?;
        (0..RECEIVES).try_for_each(|buffer| self.post(buffer))?;
        self.arm()
    }

    /// The connection's identifier.
    pub(in crate::rdma) fn id(&self) -> &CmId {
        &self.id
    }

    /// Whether a write takes an immediate word. iWARP's do not (RFC 5040).
    pub(in crate::rdma) fn has_words(&self) -> bool {
        // SAFETY: the completions' context and its device live as long as they.
        let transport = unsafe { (*(*(*self.completions).context).device).transport_type };
        transport != ibv_transport_type::IBV_TRANSPORT_IWARP
    }

    /// To be waited for before [`Self::woken`].
    pub(in crate::rdma) fn watch(&self) -> io::Result<Watch> {
        // SAFETY: the channel lives.
        Watch::new(unsafe { (*self.channel).fd })
    }

    fn raw(&self) -> *mut ibv_qp {
        // SAFETY: the identifier lives.
        unsafe { (*self.id.raw()).qp }
    }

    /// Lets the next completion wake who waits. Completions that came before it do not.
    pub(in crate::rdma) fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue lives.
        numbered(unsafe { ibv_req_notify_cq(self.completions, 0) }, "ibv_req_notify_cq")
    }

    /// Takes what woke, if anything did.
    pub(in crate::rdma) fn woken(&self) -> bool {
        let (mut queue, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel lives, and never blocks; what was got is acknowledged.
        let got = unsafe { ibv_get_cq_event(self.channel, &mut queue, &mut context) } == 0;
        if got {
            // SAFETY: as above.
            unsafe { ibv_ack_cq_events(queue, 1) };
        }
        got
    }

    /// Posts a receive buffer.
    pub(in crate::rdma) fn post(&mut self, buffer: usize) -> io::Result<()> {
        let (key, memory) = &self.inbox;
        let mut at = ibv_sge {
            addr: memory.start() as u64 + (buffer * PACKET) as u64,
            length: PACKET as u32,
            lkey: key.local(),
        };
        let mut request =
            ibv_recv_wr { wr_id: RECEIVE | buffer as u64, next: null_mut(), sg_list: &mut at, num_sge: 1 };
        let mut bad = null_mut();
        // SAFETY: the buffer is the queue pair's, and is not looked at before its completion.
        numbered(unsafe { ibv_post_recv(self.raw(), &mut request, &mut bad) }, "ibv_post_recv")
    }

    /// The packet in a receive buffer, before that is posted again.
    pub(in crate::rdma) fn packet(&self, buffer: usize, length: usize) -> &[u8] {
        assert!(buffer < RECEIVES && length <= PACKET, "a buffer of the inbox");
        // SAFETY: the buffer is in the inbox, and not posted: no device writes it.
        unsafe { std::slice::from_raw_parts(self.inbox.1.start().add(buffer * PACKET), length) }
    }

    /// Sends what `write` puts into a buffer; it gives the length.
    pub(in crate::rdma) fn send(&mut self, write: impl FnOnce(&mut [u8]) -> usize) -> io::Result<()> {
        let buffer = self.free.pop().ok_or_else(|| io::Error::other("all send buffers are on their way"))?;
        let (key, memory) = &self.outbox;
        // SAFETY: the buffer is free: no device reads it, and nobody else writes it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory.start().add(buffer * PACKET), PACKET) };
        let at = ibv_sge { addr: bytes.as_ptr() as u64, length: write(bytes) as u32, lkey: key.local() };
        self.request(SEND | buffer as u64, &mut [at], None)
    }

    /// Writes parts one after another to a slot, with a word if there is one; gives the write's number. Long parts are lent, not copied.
    pub(in crate::rdma) fn write(&mut self, to: SlotGrant, parts: Parts, word: Option<u32>) -> io::Result<u64> {
        let parts = joined(parts, self.sge_max);
        let lent: Vec<Lent> = parts.into_iter().map(|p| Lent::new(&self.domain, p)).collect::<io::Result<_>>()?;
        let at =
            |l: &Lent| ibv_sge { addr: l.bytes.as_ptr() as u64, length: l.bytes.len() as u32, lkey: l.key.local() };
        let mut places: Vec<ibv_sge> = lent.iter().map(at).collect();
        self.writes += 1;
        let number = self.writes;
        self.lent.insert(number, lent);
        self.request(WRITE | number, &mut places, Some((to, word)))?;
        Ok(number)
    }

    fn request(&mut self, number: u64, places: &mut [ibv_sge], to: Option<(SlotGrant, Option<u32>)>) -> io::Result<()> {
        // SAFETY: all fields are numbers, or pointers that may be null.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = number;
        request.sg_list = places.as_mut_ptr();
        request.num_sge = places.len() as i32;
        request.opcode = ibv_wr_opcode::IBV_WR_SEND;
        if let Some((slot, word)) = to {
            request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
            if let Some(word) = word {
                request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
                request.imm_data_invalidated_rkey_union = imm_data_invalidated_rkey_union_t { imm_data: word.to_be() };
            }
            request.wr = wr_t { rdma: rdma_t { remote_addr: slot.address, rkey: slot.key } };
        }
        let mut bad = null_mut();
        // SAFETY: the places are in the outbox, in a buffer that is not free, or lent until the request has ended.
        numbered(unsafe { ibv_post_send(self.raw(), &mut request, &mut bad) }, "ibv_post_send")
    }

    /// Lets the peer write to memory.
    pub(in crate::rdma) fn grant(&self, memory: Memory) -> io::Result<Granted> {
        Granted::new(&self.domain, memory)
    }

    /// The next request that has ended, if one has; why, if it failed. Then the queue pair is of no more use.
    pub(in crate::rdma) fn done(&mut self) -> io::Result<Option<Done>> {
        if self.taken.is_empty() {
            self.take()?;
        }
        let Some((number, result)) = self.taken.pop_front() else { return Ok(None) };
        match number & KINDS {
            SEND => self.free.push((number & !KINDS) as usize),
            WRITE => drop(self.lent.remove(&(number & !KINDS))),
            _ => {}
        }
        result.map(Some).map_err(io::Error::other)
    }

    fn take(&mut self) -> io::Result<()> {
        // SAFETY: completions are numbers.
        let mut completions: [ibv_wc; BATCH] = unsafe { std::mem::zeroed() };
        // SAFETY: the queue lives, and there is room for so many.
        let got = unsafe { ibv_poll_cq(self.completions, BATCH as i32, completions.as_mut_ptr()) };
        let got = usize::try_from(got).map_err(|_| io::Error::other("the completions cannot be read"))?;
        self.taken.extend(completions[..got].iter().map(|c| (c.wr_id, outcome(c))));
        Ok(())
    }

    /// Puts the queue pair into its error state: all that is on its way fails (chaos).
    pub(in crate::rdma) fn fail(&self) -> io::Result<()> {
        // SAFETY: all fields are numbers.
        let mut state: ibv_qp_attr = unsafe { std::mem::zeroed() };
        state.qp_state = ibv_qp_state::IBV_QPS_ERR;
        let mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as i32;
        // SAFETY: the queue pair lives.
        numbered(unsafe { ibv_modify_qp(self.raw(), &mut state, mask) }, "ibv_modify_qp")
    }

    /// Ends the connection: the peer learns of it.
    pub(in crate::rdma) fn disconnect(&self) {
        self.id.disconnect();
    }
}

fn outcome(completion: &ibv_wc) -> Result<Done, String> {
    if completion.status != ibv_wc_status::IBV_WC_SUCCESS {
        // SAFETY: the call gives a constant.
        let why = unsafe { CStr::from_ptr(ibv_wc_status_str(completion.status)) };
        return Err(format!("a request failed: {} ({})", why.to_string_lossy(), completion.status));
    }
    let number = completion.wr_id & !KINDS;
    Ok(match completion.wr_id & KINDS {
        SEND => Done::Sent,
        WRITE => Done::Placed(number),
        _ if completion.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM => {
            // SAFETY: with this operation there is a word.
            let word = unsafe { completion.imm_data_invalidated_rkey_union.imm_data };
            Done::Written(number as usize, u32::from_be(word))
        }
        _ => Done::Received(number as usize, completion.byte_len as usize),
    })
}

/// Joins neighbours that are short, and all from where a device takes no more.
fn joined(parts: Parts, most: usize) -> Vec<Bytes> {
    let (mut joined, mut short) = (Vec::<Bytes>::new(), BytesMut::new());
    let count = parts.len();
    for (n, part) in parts.into_iter().enumerate() {
        let places = joined.len() + usize::from(!short.is_empty()) + 1 + usize::from(n + 1 < count);
        if part.len() < COPIED || places > most {
            short.extend_from_slice(&part);
            continue;
        }
        if !short.is_empty() {
            joined.push(short.split().freeze());
        }
        joined.push(part);
    }
    if !short.is_empty() {
        joined.push(short.freeze());
    }
    joined
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the queue pair ends first, so that no device reads or writes the memory that is freed after it; then the
        // completions, of which no event is left unacknowledged, then their channel.
        unsafe {
            if !self.raw().is_null() {
                rdma_destroy_qp(self.id.raw());
            }
            if !self.completions.is_null() {
                ibv_destroy_cq(self.completions);
            }
            ibv_destroy_comp_channel(self.channel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_parts_are_joined_and_no_more_are_left_than_a_device_takes() {
        for most in 1..5 {
            for lengths in
                [vec![], vec![9], vec![5000], vec![9, 5000], vec![5000, 9, 9, 5000, 5000, 5000, 1], vec![4096; 9]]
            {
                let parts: Parts = lengths.iter().enumerate().map(|(n, l)| vec![n as u8; *l].into()).collect();
                let whole = parts.concat();
                let joined = joined(parts, most);
                assert!(joined.len() <= most, "{lengths:?} in {most}");
                assert_eq!(joined.concat(), whole, "{lengths:?} in {most}");
            }
        }
        let long: Bytes = vec![1; 5000].into();
        let joined = joined([long.clone(), long.clone()].into_iter().collect(), 4);
        assert!(joined[0].as_ptr() == long.as_ptr(), "what is long is lent");
    }
}
