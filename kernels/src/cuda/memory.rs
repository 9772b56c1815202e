//! Memory of a GPU that may be given back on any thread.
//!
//! The driver frees memory in the context of the calling thread, and a handle is dropped on whichever thread held it last: one of a
//! pool of threads, say, that never did anything on a GPU. There the memory would not be freed, and the next call of anybody would
//! fail of it. So the context comes first.

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, LaunchArgs, PushKernelArg, SyncOnDrop,
    result,
};
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub struct Memory<T>(ManuallyDrop<CudaSlice<T>>);

impl<T> Memory<T> {
    pub(super) fn new(slice: CudaSlice<T>) -> Self {
        Self(ManuallyDrop::new(slice))
    }
}

/// Makes a context the thread's, so that what is of it can be freed. Unlike a call that can tell an error it leaves an earlier one
/// for the next who can.
pub(super) fn enter(context: &CudaContext) {
    // SAFETY: the context is alive as long as its borrow.
    context.record_err(unsafe { result::ctx::set_current(context.cu_ctx()) });
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        enter(self.0.context());
        // SAFETY: it is not used after this, nor dropped again.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

impl<T> Deref for Memory<T> {
    type Target = CudaSlice<T>;

    fn deref(&self) -> &CudaSlice<T> {
        &self.0
    }
}

impl<T> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut CudaSlice<T> {
        &mut self.0
    }
}

impl<T> DeviceSlice<T> for Memory<T> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.0.stream()
    }
}

impl<T> DevicePtr<T> for Memory<T> {
    fn device_ptr<'a>(&'a self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        self.0.device_ptr(stream)
    }
}

impl<T> DevicePtrMut<T> for Memory<T> {
    fn device_ptr_mut<'a>(&'a mut self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        self.0.device_ptr_mut(stream)
    }
}

// SAFETY: the argument is that of the memory within, which is borrowed as long.
unsafe impl<'a, 'b: 'a, T> PushKernelArg<&'b Memory<T>> for LaunchArgs<'a> {
    fn arg(&mut self, memory: &'b Memory<T>) -> &mut Self {
        self.arg(&**memory)
    }
}

// SAFETY: as above.
unsafe impl<'a, 'b: 'a, T> PushKernelArg<&'b mut Memory<T>> for LaunchArgs<'a> {
    fn arg(&mut self, memory: &'b mut Memory<T>) -> &mut Self {
        self.arg(&mut **memory)
    }
}
