//! A handle to a matrix on some device.
//!
//! Cloning a handle is cheap and shares the data; data is never changed through a handle, so an
//! actor may keep one in an outbox, a snapshot and a running job at the same time.

use crate::low::{Columns, Matrix, Quantised};
use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// What a GPU backend keeps behind a handle.
pub trait DeviceBuffer: Any + Send + Sync + fmt::Debug {
    /// For the backend that made the buffer to get its own type back.
    fn as_any(&self) -> &dyn Any;
}

/// Where the elements are.
#[derive(Debug, Clone)]
pub(crate) enum Data {
    F32(Arc<Vec<f32>>),
    U32(Arc<Vec<u32>>),
    /// Codes, and a scale for each tile of 128 columns.
    E4m3(Arc<Vec<u8>>, Arc<Vec<f32>>),
    Device(Arc<dyn DeviceBuffer>),
}

/// Low-precision forms of a matrix that the CPU's products have asked for: made once, whoever asks.
#[derive(Debug, Default)]
pub(crate) struct Forms {
    /// In BF16.
    pub(crate) rounded: OnceLock<Matrix>,
    /// As the columns of a product with its rows, and with its columns: in BF16, and in FP8 with scales.
    pub(crate) by_rows: [OnceLock<(Columns, Vec<f32>)>; 2],
    pub(crate) by_columns: [OnceLock<(Columns, Vec<f32>)>; 2],
    /// In E4M3 in blocks.
    pub(crate) blocks: OnceLock<Quantised>,
    /// In E4M3 along its rows, by scaling.
    pub(crate) along_rows: [OnceLock<Quantised>; 2],
    /// In E4M3 along its columns, by scaling: straight, and by way of its rows' form as columns of a product.
    pub(crate) along_columns: [OnceLock<Quantised>; 2],
    pub(crate) again: [OnceLock<(Columns, Vec<f32>)>; 2],
}

/// A row-major matrix of `rows x columns`. A vector is one row; a list of indices is one row of u32.
#[derive(Clone)]
pub struct Tensor {
    rows: usize,
    columns: usize,
    data: Data,
    forms: Arc<Forms>,
}

impl Tensor {
    /// A matrix in host memory. Panics if the lengths disagree: that is a broken caller.
    pub fn host(rows: usize, columns: usize, data: Arc<Vec<f32>>) -> Self {
        assert_eq!(data.len(), rows * columns, "elements of a {rows} x {columns} matrix");
        Self { rows, columns, data: Data::F32(data), forms: Arc::default() }
    }

    /// A matrix in host memory from its elements.
    pub fn from_vec(rows: usize, columns: usize, data: Vec<f32>) -> Self {
        Self::host(rows, columns, Arc::new(data))
    }

    /// A list of indices or counts in host memory.
    pub fn indices(data: Vec<u32>) -> Self {
        Self { rows: 1, columns: data.len(), data: Data::U32(Arc::new(data)), forms: Arc::default() }
    }

    /// A matrix behind a device's buffer.
    pub fn device(rows: usize, columns: usize, buffer: Arc<dyn DeviceBuffer>) -> Self {
        Self { rows, columns, data: Data::Device(buffer), forms: Arc::default() }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The elements, if they are f32 in host memory.
    pub fn as_host(&self) -> Option<&Arc<Vec<f32>>> {
        match &self.data {
            Data::F32(data) => Some(data),
            Data::U32(_) | Data::E4m3(..) | Data::Device(_) => None,
        }
    }

    /// A quantised matrix in host memory.
    pub(crate) fn quantised(rows: usize, columns: usize, codes: Vec<u8>, scales: Vec<f32>) -> Self {
        assert_eq!(codes.len(), rows * columns, "codes of a {rows} x {columns} matrix");
        Self { rows, columns, data: Data::E4m3(Arc::new(codes), Arc::new(scales)), forms: Arc::default() }
    }

    /// Codes and scales, if it is quantised and in host memory.
    pub fn as_quantised(&self) -> Option<(&[u8], &[f32])> {
        match &self.data {
            Data::E4m3(codes, scales) => Some((codes, scales)),
            Data::F32(_) | Data::U32(_) | Data::Device(_) => None,
        }
    }

    pub(crate) fn forms(&self) -> &Forms {
        &self.forms
    }

    pub(crate) fn f32s(&self) -> &[f32] {
        self.as_host().expect("an f32 matrix of the CPU backend")
    }

    pub(crate) fn u32s(&self) -> &[u32] {
        match &self.data {
            Data::U32(data) => data,
            Data::F32(_) | Data::E4m3(..) | Data::Device(_) => panic!("a list of indices of the CPU backend"),
        }
    }

    /// What is behind the handle, if it is on a device.
    pub fn buffer(&self) -> Option<&dyn DeviceBuffer> {
        match &self.data {
            Data::Device(buffer) => Some(buffer.as_ref()),
            Data::F32(_) | Data::U32(_) | Data::E4m3(..) => None,
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.data {
            Data::F32(_) => "f32",
            Data::U32(_) => "u32",
            Data::E4m3(..) => "e4m3",
            Data::Device(_) => "device",
        };
        write!(f, "Tensor({} x {} {kind})", self.rows, self.columns)
    }
}
