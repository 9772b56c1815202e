//! What is behind a handle: elements on the GPU, whole or rows of others', and how handles of host memory get there.

use super::CudaBackend;
use super::elements::by_element;
use crate::backend::BackendError;
use crate::cuda::device::{Gpu, run};
use crate::cuda::failure::told;
use crate::cuda::memory::Memory;
use crate::cuda::products::{Blocks, Codes};
use crate::cuda::sources::PRODUCT;
use crate::math::{bf16_bits, bf16_value};
use crate::tensor::{DeviceBuffer, Place, Tensor};
use cudarc::driver::{CudaView, DevicePtr};
use std::any::Any;
use std::sync::Arc;

/// Several matrices, or the error of the operation.
pub(super) type Made<const N: usize> = Result<[Elements; N], BackendError>;

#[derive(Debug)]
enum Held {
    F32(Memory<f32>),
    Bf16(Memory<u16>),
}

/// Elements of a matrix. Kernels get addresses: all work is on one stream, in whose order memory is freed too.
#[derive(Debug, Clone)]
pub(super) struct Elements {
    memory: Arc<Held>,
    from: usize,
    count: usize,
}

impl Elements {
    pub(super) fn f32(data: Memory<f32>) -> Self {
        Self { from: 0, count: data.len(), memory: Arc::new(Held::F32(data)) }
    }

    pub(super) fn bf16(data: Memory<u16>) -> Self {
        Self { from: 0, count: data.len(), memory: Arc::new(Held::Bf16(data)) }
    }

    /// Elements `from..from + count` of these.
    pub(super) fn part(&self, from: usize, count: usize) -> Self {
        assert!(from + count <= self.count, "elements {from} to {} of {}", from + count, self.count);
        Self { memory: Arc::clone(&self.memory), from: self.from + from, count }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn is_low(&self) -> bool {
        matches!(*self.memory, Held::Bf16(_))
    }

    /// Of the first element.
    pub(super) fn address(&self) -> u64 {
        match &*self.memory {
            Held::F32(data) => data.device_ptr(data.stream()).0 + 4 * self.from as u64,
            Held::Bf16(data) => data.device_ptr(data.stream()).0 + 2 * self.from as u64,
        }
    }

    /// Panics if they are BF16, which is a broken caller.
    pub(super) fn floats(&self) -> CudaView<'_, f32> {
        let Held::F32(data) = &*self.memory else { panic!("elements in FP32") };
        data.slice(self.from..self.from + self.count)
    }

    /// Panics if they are FP32.
    pub(super) fn words(&self) -> CudaView<'_, u16> {
        let Held::Bf16(data) = &*self.memory else { panic!("elements in BF16") };
        data.slice(self.from..self.from + self.count)
    }

    /// Their values, when all before is done.
    pub(super) fn download(&self, gpu: &Gpu) -> Result<Vec<f32>, BackendError> {
        if self.is_low() {
            let words = gpu.stream.clone_dtoh(&self.words()).map_err(|e| gpu.error(told(e)))?;
            return Ok(words.into_iter().map(bf16_value).collect());
        }
        gpu.stream.clone_dtoh(&self.floats()).map_err(|e| gpu.error(told(e)))
    }

    pub(super) fn tensor(self, rows: usize, columns: usize) -> Tensor {
        assert_eq!(self.count, rows * columns, "elements of a {rows} x {columns} matrix");
        Tensor::device(rows, columns, Arc::new(Buffer::Matrix(self)))
    }

    fn ordinal(&self) -> usize {
        match &*self.memory {
            Held::F32(data) => data.ordinal(),
            Held::Bf16(data) => data.ordinal(),
        }
    }
}

/// A list of indices or counts, with a copy in host memory if it came from there: launches of products by group need it.
#[derive(Debug, Clone)]
pub(super) struct Indices {
    pub(super) data: Arc<Memory<u32>>,
    pub(super) host: Option<Arc<Vec<u32>>>,
    /// More than any of them.
    pub(super) below: u64,
}

/// What is behind a handle, or kept with one.
#[derive(Debug)]
pub(super) enum Buffer {
    Matrix(Elements),
    Indices(Indices),
    /// In E4M3 with scales along its terms.
    Codes(Codes),
    /// A weight in E4M3, in both orders that products read.
    Weight([Blocks; 2]),
    /// Of an operation that failed.
    Nothing,
}

impl Buffer {
    /// The number of the GPU that has it.
    fn ordinal(&self) -> Option<usize> {
        Some(match self {
            Self::Matrix(elements) => elements.ordinal(),
            Self::Indices(indices) => indices.data.ordinal(),
            Self::Codes(codes) => codes.codes().ordinal(),
            Self::Weight([weight, _]) => weight.ordinal(),
            Self::Nothing => return None,
        })
    }
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
    pub(super) fn list(&self, count: usize, result: Result<Indices, BackendError>) -> Tensor {
        match result {
            Ok(indices) => Tensor::device(1, count, Arc::new(Buffer::Indices(indices))),
            Err(error) => {
                self.fail(error);
                nothing(1, count)
            }
        }
    }

    /// Elements as activations are stored.
    pub(super) fn activation(&self, x: &Tensor) -> Result<Elements, BackendError> {
        self.elements(x, self.low())
    }

    /// Elements in FP32, widened if they are not.
    pub(super) fn wide(&self, x: &Tensor) -> Result<Elements, BackendError> {
        self.elements(x, false)
    }

    /// Elements as they are: on this GPU, or, from host memory, as activations are stored.
    pub(super) fn stored(&self, x: &Tensor) -> Result<Elements, BackendError> {
        match self.behind(x) {
            Some(Buffer::Matrix(elements)) => self.elements(x, elements.is_low()),
            _ => self.activation(x),
        }
    }

    /// Elements on this GPU, in BF16 if `low`. Those of host memory are copied there once in each form.
    pub(super) fn elements(&self, x: &Tensor, low: bool) -> Result<Elements, BackendError> {
        let found = match x.buffer() {
            Some(_) => self.behind(x),
            None => {
                let copy = || self.copied(&x.values(), low).map(Buffer::Matrix);
                Some(self.kept(&x.forms().on_device.elements[usize::from(low)], copy)?)
            }
        };
        match found {
            Some(Buffer::Matrix(elements)) => self.in_form(elements, low),
            _ => Err(self.gpu.error(format!("{x:?} has no elements on this device"))),
        }
    }

    /// What is behind a handle, if it is on this GPU.
    pub(super) fn behind<'a>(&self, x: &'a Tensor) -> Option<&'a Buffer> {
        self.if_here(x.buffer()?)
    }

    fn if_here<'a>(&self, buffer: &'a dyn DeviceBuffer) -> Option<&'a Buffer> {
        let buffer: &Buffer = buffer.as_any().downcast_ref()?;
        (buffer.ordinal() == Some(self.gpu.stream.context().ordinal())).then_some(buffer)
    }

    /// What is kept in a place, made if there is nothing. Of two threads that make it at once one keeps its own.
    pub(super) fn kept<'a>(
        &self,
        place: &'a Place,
        make: impl FnOnce() -> Result<Buffer, BackendError>,
    ) -> Result<&'a Buffer, BackendError> {
        if place.get().is_none() {
            let _ = place.set(Arc::new(make()?));
        }
        let kept = place.get().expect("it was set");
        self.if_here(kept.as_ref()).ok_or_else(|| self.gpu.error("what a handle keeps is on another device"))
    }

    /// Numbers of host memory, rounded to BF16 if `low`.
    pub(super) fn copied(&self, data: &[f32], low: bool) -> Result<Elements, BackendError> {
        if low {
            let words: Vec<u16> = data.iter().map(|x| bf16_bits(*x)).collect();
            return self.gpu.upload(&words).map(Elements::bf16);
        }
        self.gpu.upload(data).map(Elements::f32)
    }

    /// Room for a matrix in BF16, if `low`, or FP32; its kernel writes it whole.
    pub(super) fn room_in(&self, count: usize, low: bool) -> Result<Elements, BackendError> {
        if low { self.gpu.room(count).map(Elements::bf16) } else { self.gpu.room(count).map(Elements::f32) }
    }

    /// The elements themselves if they have the form, or others.
    pub(super) fn in_form(&self, x: &Elements, low: bool) -> Result<Elements, BackendError> {
        if x.is_low() == low {
            return Ok(x.clone());
        }
        let (y, count, shape) = (self.room_in(x.len(), low)?, x.len() as u64, by_element(x.len()));
        if low {
            run!(self.gpu, PRODUCT, "narrow", shape, &x.address(), &y.address(), &count)?;
        } else {
            run!(self.gpu, PRODUCT, "widen", shape, &x.address(), &y.address(), &count)?;
        }
        Ok(y)
    }

    /// A list of indices or counts on this GPU.
    pub(super) fn indices(&self, x: &Tensor) -> Result<Indices, BackendError> {
        match self.behind(x) {
            Some(Buffer::Indices(indices)) => Ok(indices.clone()),
            _ => Err(self.gpu.error(format!("{x:?} has no indices on this device"))),
        }
    }

    /// The numbers of a list, from where they came if that was host memory.
    pub(super) fn numbers(&self, x: &Tensor) -> Result<Arc<Vec<u32>>, BackendError> {
        let indices = self.indices(x)?;
        match indices.host {
            Some(host) => Ok(host),
            None => self.gpu.download(&*indices.data).map(Arc::new),
        }
    }

    /// Rows of all, one matrix after another: the same data if they lie so already.
    pub(super) fn stacked(&self, parts: &[Tensor]) -> Result<Elements, BackendError> {
        assert!(parts.iter().all(|part| part.columns() == parts[0].columns()), "rows of one width: {parts:?}");
        let parts = parts.iter().map(|part| self.activation(part)).collect::<Result<Vec<_>, _>>()?;
        let count = parts.iter().map(Elements::len).sum();
        // A part without rows is everywhere.
        let first = parts.iter().find(|part| part.count > 0).unwrap_or(&parts[0]);
        let mut end = first.from;
        let follows = parts.iter().filter(|part| part.count > 0).all(|part| {
            let next = Arc::ptr_eq(&part.memory, &first.memory) && part.from == end;
            end += part.count;
            next
        });
        if follows {
            return Ok(Elements { count, ..first.clone() });
        }
        Ok(if self.low() {
            Elements::bf16(self.gpu.joined(&parts.iter().map(Elements::words).collect::<Vec<_>>())?)
        } else {
            Elements::f32(self.gpu.joined(&parts.iter().map(Elements::floats).collect::<Vec<_>>())?)
        })
    }
}
