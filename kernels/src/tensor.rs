//! A handle to a matrix on some device.
//!
//! Cloning a handle is cheap and shares the data; data is never changed through a handle, so an
//! actor may keep one in an outbox, a snapshot and a running job at the same time. Rows of a matrix are a
//! handle to the same data.

use crate::element::{self, Bf16};
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
enum Data {
    F32(Arc<Vec<f32>>),
    Bf16(Arc<Vec<Bf16>>),
    /// Rows of several matrices, one after another.
    Stacked(Arc<Vec<Tensor>>),
    U32(Arc<Vec<u32>>),
    /// Codes, and a scale for each tile of 128 columns.
    E4m3(Arc<Vec<u8>>, Arc<Vec<f32>>),
    Device(Arc<dyn DeviceBuffer>),
}

/// What a GPU's backend keeps of a matrix: made once, whoever asks.
#[cfg(feature = "cuda")]
pub(crate) type Place = OnceLock<Arc<dyn DeviceBuffer>>;

/// On the GPU of the backend that asked first.
#[cfg(feature = "cuda")]
#[derive(Debug, Default)]
pub(crate) struct OnDevice {
    /// In FP32 and in BF16.
    pub(crate) elements: [Place; 2],
    /// In FP8 as in [`Forms`]: a weight in both of its orders; the others by scaling.
    pub(crate) blocks: Place,
    pub(crate) along_rows: [Place; 2],
    pub(crate) along_columns: [Place; 2],
    pub(crate) again: [Place; 2],
}

/// Forms of a matrix that products have asked for: made once, whoever asks.
#[derive(Debug, Default)]
pub(crate) struct Forms {
    /// In one piece, if it is stacked.
    whole: OnceLock<Tensor>,
    #[cfg(feature = "cuda")]
    pub(crate) on_device: OnDevice,
    /// In BF16, with whole blocks of columns.
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

/// Runs an expression on the elements of a matrix in host memory, f32 or BF16, whatever it stores.
macro_rules! with_elements {
    ($tensor:expr, $elements:ident => $run:expr) => {
        if $tensor.is_bf16() {
            let $elements = $tensor.bf16s();
            $run
        } else {
            let $elements = $tensor.f32s();
            $run
        }
    };
}
pub(crate) use with_elements;

/// How a matrix travels, and is stored, as words of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    /// An f32 each.
    F32,
    /// Two BF16 each; the last one may be alone.
    Bf16,
}

impl Words {
    /// Words of `elements`.
    pub fn count(self, elements: usize) -> usize {
        match self {
            Self::F32 => elements,
            Self::Bf16 => elements.div_ceil(2),
        }
    }
}

/// A row-major matrix of `rows x columns`. A vector is one row; a list of indices is one row of u32.
#[derive(Clone)]
pub struct Tensor {
    rows: usize,
    columns: usize,
    data: Data,
    /// The first element, in f32 or BF16.
    from: usize,
    /// Most handles are never asked for one: a small place for a large one.
    forms: Arc<OnceLock<Box<Forms>>>,
}

impl Tensor {
    fn new(rows: usize, columns: usize, data: Data) -> Self {
        Self { rows, columns, data, from: 0, forms: Arc::default() }
    }

    /// The same data, without the forms that products asked for: they go with the other handles.
    pub(crate) fn alone(&self) -> Self {
        Self { forms: Arc::default(), ..self.clone() }
    }

    /// A matrix in host memory. Panics if the lengths disagree: that is a broken caller.
    pub fn host(rows: usize, columns: usize, data: Arc<Vec<f32>>) -> Self {
        assert_eq!(data.len(), rows * columns, "elements of a {rows} x {columns} matrix");
        Self::new(rows, columns, Data::F32(data))
    }

    /// A matrix of BF16 in host memory. Panics if the lengths disagree.
    pub fn bf16(rows: usize, columns: usize, data: Arc<Vec<Bf16>>) -> Self {
        assert_eq!(data.len(), rows * columns, "elements of a {rows} x {columns} matrix");
        Self::new(rows, columns, Data::Bf16(data))
    }

    /// A matrix in host memory from its elements.
    pub fn from_vec(rows: usize, columns: usize, data: Vec<f32>) -> Self {
        Self::host(rows, columns, Arc::new(data))
    }

    /// A list of indices or counts in host memory.
    pub fn indices(data: Vec<u32>) -> Self {
        Self::new(1, data.len(), Data::U32(Arc::new(data)))
    }

    /// A matrix behind a device's buffer.
    pub fn device(rows: usize, columns: usize, buffer: Arc<dyn DeviceBuffer>) -> Self {
        Self::new(rows, columns, Data::Device(buffer))
    }

    /// A quantised matrix in host memory.
    pub(crate) fn quantised(rows: usize, columns: usize, codes: Vec<u8>, scales: Vec<f32>) -> Self {
        assert_eq!(codes.len(), rows * columns, "codes of a {rows} x {columns} matrix");
        Self::new(rows, columns, Data::E4m3(Arc::new(codes), Arc::new(scales)))
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The elements, if they are the whole of f32 data in host memory.
    pub fn as_host(&self) -> Option<&Arc<Vec<f32>>> {
        match &self.data {
            Data::F32(data) if data.len() == self.len() => Some(data),
            _ => None,
        }
    }

    /// What its elements are stored as, if they are the whole of f32 or BF16 data in host memory.
    pub fn stored_as(&self) -> Option<Words> {
        match &self.data {
            Data::F32(data) if data.len() == self.len() => Some(Words::F32),
            Data::Bf16(data) if data.len() == self.len() => Some(Words::Bf16),
            _ => None,
        }
    }

    /// Zeros in host memory.
    pub fn zeros(rows: usize, columns: usize, stored: Words) -> Self {
        match stored {
            Words::F32 => Self::from_vec(rows, columns, vec![0.0; rows * columns]),
            Words::Bf16 => Self::bf16(rows, columns, Arc::new(vec![Bf16(0); rows * columns])),
        }
    }

    /// The elements as words for the way to another process. Data that is a matrix of f32 is lent, other is
    /// copied. Panics if it is not in host memory.
    pub fn to_words(&self) -> (Words, Arc<Vec<f32>>) {
        if self.is_bf16() {
            let mut words = vec![0.0f32; Words::Bf16.count(self.len())];
            bytemuck::cast_slice_mut::<f32, Bf16>(&mut words)[..self.len()].copy_from_slice(self.bf16s());
            return (Words::Bf16, Arc::new(words));
        }
        let whole = self.whole();
        (Words::F32, whole.as_host().map_or_else(|| Arc::new(whole.f32s().to_vec()), Arc::clone))
    }

    /// The matrix that came as words. Panics if there are not as many as [`Words::count`] says.
    pub fn from_words(rows: usize, columns: usize, kind: Words, words: Arc<Vec<f32>>) -> Self {
        assert_eq!(words.len(), kind.count(rows * columns), "words of a {rows} x {columns} matrix");
        match kind {
            Words::F32 => Self::host(rows, columns, words),
            Words::Bf16 => {
                let elements = &bytemuck::cast_slice::<f32, Bf16>(&words)[..rows * columns];
                Self::bf16(rows, columns, Arc::new(elements.to_vec()))
            }
        }
    }

    /// Rows of all, one matrix after another: the same data as long as nothing asks for it in one piece.
    /// Panics if there is none.
    pub(crate) fn stacked(parts: &[Self]) -> Self {
        if let [only] = parts {
            // With the forms that products have asked for.
            return only.clone();
        }
        Self::rejoined(parts).unwrap_or_else(|| {
            let (rows, columns) = (parts.iter().map(Self::rows).sum(), parts[0].columns);
            let alike = |part: &Self| part.columns == columns && part.is_bf16() == parts[0].is_bf16();
            assert!(parts.iter().all(alike), "rows of one width and kind: {parts:?}");
            // Stacks are flat.
            let flat = |part: &Self| part.parts().map_or_else(|| vec![part.clone()], <[Self]>::to_vec);
            Self::new(rows, columns, Data::Stacked(Arc::new(parts.iter().flat_map(flat).collect())))
        })
    }

    /// What it is stacked of.
    pub(crate) fn parts(&self) -> Option<&[Self]> {
        match &self.data {
            Data::Stacked(parts) => Some(parts),
            _ => None,
        }
    }

    /// Itself, in one piece.
    fn whole(&self) -> &Self {
        let Some(parts) = self.parts() else { return self };
        self.forms().whole.get_or_init(|| {
            if self.is_bf16() {
                let data: Vec<&[Bf16]> = parts.iter().map(Self::bf16s).collect();
                Self::bf16(self.rows, self.columns, Arc::new(data.concat()))
            } else {
                let data: Vec<&[f32]> = parts.iter().map(Self::f32s).collect();
                Self::from_vec(self.rows, self.columns, data.concat())
            }
        })
    }

    /// The same elements without the parts that they came from.
    pub(crate) fn in_one_piece(&self) -> Self {
        self.whole().clone()
    }

    /// Rows `from..from + rows`, of the same data.
    pub(crate) fn view(&self, from: usize, rows: usize) -> Self {
        if self.parts().is_some() {
            return self.whole().view(from, rows);
        }
        assert!(matches!(self.data, Data::F32(_) | Data::Bf16(_)), "rows of a matrix, not of {self:?}");
        assert!(from + rows <= self.rows, "rows {from} to {} of {}", from + rows, self.rows);
        Self {
            rows,
            columns: self.columns,
            data: self.data.clone(),
            from: self.from + from * self.columns,
            forms: Arc::default(),
        }
    }

    /// The rows of all, if they follow each other in the same data.
    fn rejoined(parts: &[Self]) -> Option<Self> {
        let first = parts.iter().find(|part| part.rows > 0).or(parts.first())?;
        let mut end = first.from;
        for part in parts {
            let same = match (&first.data, &part.data) {
                (Data::F32(a), Data::F32(b)) => Arc::ptr_eq(a, b),
                (Data::Bf16(a), Data::Bf16(b)) => Arc::ptr_eq(a, b),
                _ => false,
            };
            // A part without rows is everywhere.
            if part.rows > 0 && !(same && part.columns == first.columns && part.from == end) {
                return None;
            }
            end += part.len();
        }
        Some(Self { rows: parts.iter().map(Self::rows).sum(), forms: Arc::default(), ..first.clone() })
    }

    /// Codes and scales, if it is quantised and in host memory.
    pub fn as_quantised(&self) -> Option<(&[u8], &[f32])> {
        match &self.data {
            Data::E4m3(codes, scales) => Some((codes, scales)),
            _ => None,
        }
    }

    pub(crate) fn forms(&self) -> &Forms {
        self.forms.get_or_init(Box::default)
    }

    /// Whether its elements are BF16 in host memory.
    pub(crate) fn is_bf16(&self) -> bool {
        match &self.data {
            Data::Bf16(_) => true,
            Data::Stacked(parts) => parts[0].is_bf16(),
            _ => false,
        }
    }

    fn len(&self) -> usize {
        self.rows * self.columns
    }

    pub(crate) fn f32s(&self) -> &[f32] {
        match &self.data {
            Data::F32(data) => &data[self.from..][..self.len()],
            Data::Stacked(_) => self.whole().f32s(),
            _ => panic!("an f32 matrix of the CPU backend, not {self:?}"),
        }
    }

    pub(crate) fn bf16s(&self) -> &[Bf16] {
        match &self.data {
            Data::Bf16(data) => &data[self.from..][..self.len()],
            Data::Stacked(_) => self.whole().bf16s(),
            _ => panic!("a BF16 matrix of the CPU backend, not {self:?}"),
        }
    }

    pub(crate) fn u32s(&self) -> &[u32] {
        match &self.data {
            Data::U32(data) => data,
            _ => panic!("a list of indices of the CPU backend, not {self:?}"),
        }
    }

    /// The values in f32, widened if they are stored in BF16.
    pub(crate) fn values(&self) -> std::borrow::Cow<'_, [f32]> {
        if self.is_bf16() { element::values(self.bf16s()).into() } else { self.f32s().into() }
    }

    /// What is behind the handle, if it is on a device.
    pub fn buffer(&self) -> Option<&dyn DeviceBuffer> {
        match &self.data {
            Data::Device(buffer) => Some(buffer.as_ref()),
            _ => None,
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.data {
            Data::F32(_) => "f32",
            Data::Bf16(_) => "bf16",
            Data::Stacked(_) => "stacked",
            Data::U32(_) => "u32",
            Data::E4m3(..) => "e4m3",
            Data::Device(_) => "device",
        };
        write!(f, "Tensor({} x {} {kind})", self.rows, self.columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_share_data_and_find_each_other_again() {
        let x = Tensor::from_vec(5, 2, (0..10).map(|i| i as f32).collect());
        let parts = [x.view(1, 2), x.view(3, 0), x.view(3, 1)];
        let joined = Tensor::rejoined(&parts).expect("they follow each other");
        assert_eq!((joined.rows(), joined.f32s()), (3, &x.f32s()[2..8]));
        assert!(Tensor::rejoined(&[x.view(0, 1), x.view(2, 1)]).is_none(), "a row is missing");
        assert!(Tensor::rejoined(&[x.view(0, 1), Tensor::from_vec(1, 2, vec![2.0, 3.0])]).is_none(), "other data");
        assert_eq!(joined.view(1, 1).f32s(), [4.0, 5.0]);
    }

    #[test]
    fn a_stack_is_its_parts_one_after_another() {
        let x = Tensor::from_vec(5, 2, (0..10).map(|i| i as f32).collect());
        let low = Tensor::bf16(5, 2, Arc::new(element::rounded(x.f32s())));
        for x in [&x, &low] {
            let stack = Tensor::stacked(&[x.view(3, 2), Tensor::stacked(&[x.view(0, 1), x.view(2, 1)])]);
            assert_eq!((stack.rows(), stack.parts().expect("they lie apart").len()), (4, 3));
            assert_eq!(*stack.values(), [6.0, 7.0, 8.0, 9.0, 0.0, 1.0, 4.0, 5.0]);
            assert_eq!(*stack.view(1, 2).values(), [8.0, 9.0, 0.0, 1.0]);
            let (kind, words) = stack.to_words();
            assert_eq!(Tensor::from_words(4, 2, kind, words).values(), stack.values());
        }
        assert!(Tensor::stacked(&[x.view(0, 2), x.view(2, 3)]).parts().is_none(), "neighbours are one matrix");
    }

    #[test]
    fn words_carry_both_kinds() {
        let x = Tensor::from_vec(3, 3, (0..9).map(|i| i as f32 - 4.5).collect());
        let low = Tensor::bf16(3, 3, Arc::new(element::rounded(x.f32s())));
        for (x, words) in [(&x, 9), (&x.view(1, 2), 6), (&low, 5), (&low.view(2, 1), 2)] {
            let (kind, data) = x.to_words();
            assert_eq!(data.len(), words);
            let back = Tensor::from_words(x.rows(), 3, kind, data);
            assert_eq!((back.is_bf16(), back.values()), (x.is_bf16(), x.values()));
        }
    }
}
