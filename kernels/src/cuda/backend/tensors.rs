//! What is behind a handle: elements on the GPU, whole or rows of others', and how handles of host memory get there.

use super::CudaBackend;
use crate::backend::BackendError;
use crate::cuda::device::Gpu;
use crate::cuda::failure::told;
use crate::tensor::{DeviceBuffer, Tensor};
use cudarc::driver::{CudaSlice, CudaView, DevicePtr};
use std::any::Any;
use std::sync::Arc;

/// Several matrices, or the error of the operation.
pub(super) type Made<const N: usize> = Result<[Floats; N], BackendError>;

/// Elements of a matrix.
#[derive(Debug, Clone)]
pub(super) struct Floats {
    data: Arc<CudaSlice<f32>>,
    from: usize,
    count: usize,
}

impl Floats {
    /// Whole results, that nobody changes any more.
    pub(super) fn new(data: CudaSlice<f32>) -> Self {
        Self { from: 0, count: data.len(), data: Arc::new(data) }
    }

    /// Elements `from..from + count` of these.
    pub(super) fn part(&self, from: usize, count: usize) -> Self {
        assert!(from + count <= self.count, "elements {from} to {} of {}", from + count, self.count);
        Self { data: Arc::clone(&self.data), from: self.from + from, count }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// For a kernel's argument.
    pub(super) fn view(&self) -> CudaView<'_, f32> {
        self.data.slice(self.from..self.from + self.count)
    }

    /// For a kernel that gets its operands in a structure. All work is on one stream, in whose order memory is freed too.
    pub(super) fn address(&self, gpu: &Gpu) -> u64 {
        self.data.device_ptr(&gpu.stream).0 + 4 * self.from as u64
    }

    pub(super) fn download(&self, gpu: &Gpu) -> Result<Vec<f32>, BackendError> {
        gpu.stream.clone_dtoh(&self.view()).map_err(|e| gpu.error(told(e)))
    }

    pub(super) fn tensor(self, rows: usize, columns: usize) -> Tensor {
        assert_eq!(self.count, rows * columns, "elements of a {rows} x {columns} matrix");
        Tensor::device(rows, columns, Arc::new(Buffer::F32(self)))
    }
}

#[derive(Debug)]
enum Buffer {
    F32(Floats),
    U32(Arc<CudaSlice<u32>>),
    /// Of an operation that failed.
    Nothing,
}

impl DeviceBuffer for Buffer {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A handle without data.
pub(super) fn nothing(rows: usize, columns: usize) -> Tensor {
    Tensor::device(rows, columns, Arc::new(Buffer::Nothing))
}

impl CudaBackend {
    /// A list of indices or counts, or its error for later.
    pub(super) fn indices(&self, count: usize, result: Result<CudaSlice<u32>, BackendError>) -> Tensor {
        match result {
            Ok(data) => Tensor::device(1, count, Arc::new(Buffer::U32(Arc::new(data)))),
            Err(error) => {
                self.fail(error);
                nothing(1, count)
            }
        }
    }

    /// The elements of a matrix on this GPU; one in host memory is copied there once.
    pub(super) fn floats(&self, x: &Tensor) -> Result<Floats, BackendError> {
        let kept = match x.buffer() {
            Some(buffer) => buffer,
            None => {
                let kept = &x.forms().on_device;
                match kept.get() {
                    Some(kept) => kept.as_ref(),
                    None => {
                        let copy: Arc<dyn DeviceBuffer> =
                            Arc::new(Buffer::F32(Floats::new(self.gpu.upload(x.f32s())?)));
                        kept.get_or_init(|| copy).as_ref()
                    }
                }
            }
        };
        match kept.as_any().downcast_ref() {
            Some(Buffer::F32(floats)) if self.is_here(floats.data.ordinal()) => Ok(floats.clone()),
            Some(Buffer::F32(_) | Buffer::U32(_) | Buffer::Nothing) | None => {
                Err(self.gpu.error(format!("{x:?} has no FP32 elements on this device")))
            }
        }
    }

    /// A list of indices or counts on this GPU.
    pub(super) fn words(&self, x: &Tensor) -> Result<Arc<CudaSlice<u32>>, BackendError> {
        match x.buffer().and_then(|b| b.as_any().downcast_ref()) {
            Some(Buffer::U32(words)) if self.is_here(words.ordinal()) => Ok(Arc::clone(words)),
            Some(Buffer::F32(_) | Buffer::U32(_) | Buffer::Nothing) | None => {
                Err(self.gpu.error(format!("{x:?} has no indices on this device")))
            }
        }
    }

    fn is_here(&self, ordinal: usize) -> bool {
        ordinal == self.gpu.stream.context().ordinal()
    }

    /// Rows of all, one matrix after another: the same data if they lie so already.
    pub(super) fn stacked(&self, parts: &[Tensor]) -> Result<Floats, BackendError> {
        assert!(parts.iter().all(|part| part.columns() == parts[0].columns()), "rows of one width: {parts:?}");
        let parts = parts.iter().map(|part| self.floats(part)).collect::<Result<Vec<_>, _>>()?;
        let count = parts.iter().map(Floats::len).sum();
        // A part without rows is everywhere.
        let first = parts.iter().find(|part| part.count > 0).unwrap_or(&parts[0]);
        let mut end = first.from;
        let follows = parts.iter().filter(|part| part.count > 0).all(|part| {
            let next = Arc::ptr_eq(&part.data, &first.data) && part.from == end;
            end += part.count;
            next
        });
        if follows {
            return Ok(Floats { count, ..first.clone() });
        }
        let (mut all, mut at) = (self.gpu.room::<f32>(count)?, 0);
        for part in parts.iter().filter(|part| part.count > 0) {
            let mut to = all.slice_mut(at..at + part.count);
            self.gpu.stream.memcpy_dtod(&part.view(), &mut to).map_err(|e| self.gpu.error(told(e)))?;
            at += part.count;
        }
        Ok(Floats::new(all))
    }
}
