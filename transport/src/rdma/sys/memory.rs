//! Memory that devices read and write.

use super::cm::CmId;
use super::{numbered, pointer};
use bytes::Bytes;
use rdma_sys::*;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::sync::Arc;

/// Whole pages of memory of one's own: what a device pins.
pub(in crate::rdma) struct Memory {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: it owns its bytes.
unsafe impl Send for Memory {}
// SAFETY: through `&` they are only read.
unsafe impl Sync for Memory {}

const PAGE: usize = 4096;

impl Memory {
    /// So many bytes, zero, in whole pages.
    pub(in crate::rdma) fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.next_multiple_of(PAGE).max(PAGE), PAGE)
            .expect("a length below half the address space");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Self { start, layout }
    }

    pub(super) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }
}

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: it owns so many bytes, all written; a device that may write them owns it instead.
        unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) }
    }
}

/// A protection domain: keys of one connection are of no use to another.
pub(super) struct Domain {
    raw: *mut ibv_pd,
    /// Keeps the device's context.
    _id: Arc<CmId>,
}

// SAFETY: libibverbs locks its objects.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(super) fn new(id: &Arc<CmId>, context: *mut ibv_context) -> io::Result<Arc<Self>> {
        // SAFETY: the context lives as long as the identifier.
        let raw = pointer(unsafe { ibv_alloc_pd(context) }, "ibv_alloc_pd")?;
        Ok(Arc::new(Self { raw, _id: Arc::clone(id) }))
    }

    pub(super) fn raw(&self) -> *mut ibv_pd {
        self.raw
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: keys hold their domain, so none is left; the queue pair ends before its domain.
        unsafe { ibv_dealloc_pd(self.raw) };
    }
}

/// A device's right to some memory. Whoever has it sees to it that the memory lives as long.
pub(super) struct Key {
    raw: *mut ibv_mr,
    _domain: Arc<Domain>,
}

// SAFETY: as for domains.
unsafe impl Send for Key {}
// SAFETY: as above.
unsafe impl Sync for Key {}

impl Key {
    /// # Safety
    /// The memory lives as long as the key, and nobody reads or writes it in a way that a device's accesses do not allow.
    pub(super) unsafe fn new(
        domain: &Arc<Domain>,
        start: *mut u8,
        bytes: usize,
        access: ibv_access_flags,
    ) -> io::Result<Self> {
        // SAFETY: the caller's.
        let raw = unsafe { ibv_reg_mr(domain.raw, start.cast(), bytes, access.0 as i32) };
        Ok(Self { raw: pointer(raw, "ibv_reg_mr")?, _domain: Arc::clone(domain) })
    }

    pub(super) fn local(&self) -> u32 {
        // SAFETY: it lives.
        unsafe { (*self.raw).lkey }
    }

    fn remote(&self) -> u32 {
        // SAFETY: it lives.
        unsafe { (*self.raw).rkey }
    }

    /// Revokes it.
    fn revoke(self) -> io::Result<()> {
        let raw = self.raw;
        let domain = Arc::clone(&self._domain);
        std::mem::forget(self);
        // SAFETY: it lives, and is not named any more; the domain lives until after the call.
        let result = numbered(unsafe { ibv_dereg_mr(raw) }, "ibv_dereg_mr");
        drop(domain);
        result
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: it lives. The connection's end revokes what this does not.
        unsafe { ibv_dereg_mr(self.raw) };
    }
}

/// Memory that the peer may write: it cannot be read before the key is revoked.
pub(in crate::rdma) struct Granted {
    key: Key,
    memory: Memory,
}

impl Granted {
    pub(super) fn new(domain: &Arc<Domain>, memory: Memory) -> io::Result<Self> {
        let access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE;
        // SAFETY: both are kept together, the memory unnamed, until the key is revoked.
        let key = unsafe { Key::new(domain, memory.start(), memory.len(), access)? };
        Ok(Self { key, memory })
    }

    /// What the peer has to name.
    pub(in crate::rdma) fn address(&self) -> u64 {
        self.memory.start() as u64
    }

    pub(in crate::rdma) fn key(&self) -> u32 {
        self.key.remote()
    }

    /// Takes the right back; gives what was written.
    pub(in crate::rdma) fn revoke(self) -> io::Result<Memory> {
        let Self { key, memory } = self;
        match key.revoke() {
            Ok(()) => Ok(memory),
            Err(error) => {
                // The peer may write there still.
                std::mem::forget(memory);
                Err(error)
            }
        }
    }
}

/// Bytes that a device reads.
pub(super) struct Lent {
    pub(super) key: Key,
    pub(super) bytes: Bytes,
}

impl Lent {
    pub(super) fn new(domain: &Arc<Domain>, bytes: Bytes) -> io::Result<Self> {
        // SAFETY: the bytes are kept with the key, and are only read: by the device too, whose key allows no more.
        let key = unsafe { Key::new(domain, bytes.as_ptr().cast_mut(), bytes.len(), ibv_access_flags(0))? };
        Ok(Self { key, bytes })
    }
}
