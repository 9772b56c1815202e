//! Matrix product with one fixed order of sums: the ground of batch invariance.
//!
//! Contract, held bit for bit by the tests against a scalar model: with `K` cut into blocks of
//! [`K_BLOCK`], every element of the product is
//! `((0 + block_0) + block_1) + …`, each block a chain of fused multiply-adds in ascending `k`
//! starting from zero. So an element depends on its row of `a` and its column of `b` alone: not on
//! the other rows, the strides, the caches of the machine or the number of threads.
//!
//! The `gemm` crate does the arithmetic. Left to itself it chooses its `K` blocks from cache sizes
//! (never below 512, so blocks of 256 stay whole) and sums otherwise for small shapes; this wrapper
//! takes both choices away from it.

use gemm::Parallelism;

/// Terms of a sum that are accumulated in registers before they are added to the result.
pub(crate) const K_BLOCK: usize = 256;

/// A read-only matrix view: element `(i, j)` is `data[i * row_stride + j * column_stride]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix whose rows follow each other.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Columns `from..from + columns` of rows that are `row_stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn check(&self) {
        if self.rows > 0 && self.columns > 0 {
            let last = (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "view of {} elements ends at {last}", self.data.len());
        }
    }
}

/// Where a product goes: row-major, rows `row_stride` apart.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) row_stride: usize,
}

/// `target = a b`, or `target += a b` block by block when `accumulate`.
pub(crate) fn gemm(target: &mut Target<'_>, a: View<'_>, b: View<'_>, accumulate: bool) {
    assert_eq!(a.columns, b.rows, "inner dimensions of a product");
    let (m, n, k) = (a.rows, b.columns, a.columns);
    if m == 0 || n == 0 {
        return;
    }
    a.check();
    b.check();
    assert!((m - 1) * target.row_stride + n <= target.data.len(), "target of a product is too small");
    if k == 0 && !accumulate {
        for i in 0..m {
            target.data[i * target.row_stride..][..n].fill(0.0);
        }
    }
    for start in (0..k).step_by(K_BLOCK) {
        let terms = K_BLOCK.min(k - start);
        let a = View { data: &a.data[start * a.column_stride..], columns: terms, ..a };
        let b = View { data: &b.data[start * b.row_stride..], rows: terms, ..b };
        // Each condition is one under which the library would sum in another order.
        let dot_products = a.column_stride == 1 && b.row_stride == 1 && m * n <= 256;
        if m == 1 || n == 1 || terms <= 2 || dot_products {
            packed_block(target, a, b, accumulate || start > 0);
        } else {
            block(target, a, b, accumulate || start > 0);
        }
    }
}

/// One block of terms by the library.
fn block(target: &mut Target<'_>, a: View<'_>, b: View<'_>, read: bool) {
    // SAFETY: both views and the target were checked to lie inside their slices for all their
    // rows and columns, and the exclusive borrow of the target rules out aliasing.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            target.data.as_mut_ptr(),
            1,
            target.row_stride as isize,
            read,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// The same for small shapes: copied to at least 2 rows, 3 terms and 2 columns, the copy of `b` by
/// row, so that the library takes its general path. Added terms are -0 times +0, which changes no sum.
/// +0 times +0 would: a chain whose terms are too small to be held may be -0.
fn packed_block(target: &mut Target<'_>, a: View<'_>, b: View<'_>, read: bool) {
    let (m, n, k) = (a.rows.max(2), b.columns.max(2), a.columns.max(3));
    let (mut x, mut y, mut out) = (vec![-0.0; m * k], vec![0.0; k * n], vec![0.0; m * n]);
    for i in 0..a.rows {
        for p in 0..a.columns {
            x[i * k + p] = a.data[i * a.row_stride + p * a.column_stride];
        }
    }
    for p in 0..a.columns {
        for j in 0..b.columns {
            y[p * n + j] = b.data[p * b.row_stride + j * b.column_stride];
        }
    }
    for i in 0..a.rows {
        out[i * n..][..b.columns].copy_from_slice(&target.data[i * target.row_stride..][..b.columns]);
    }
    block(&mut Target { data: &mut out, row_stride: n }, View::new(&x, m, k), View::new(&y, k, n), read);
    for i in 0..a.rows {
        target.data[i * target.row_stride..][..b.columns].copy_from_slice(&out[i * n..][..b.columns]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;

    /// The contract, in scalar code.
    fn model(a: View<'_>, b: View<'_>, i: usize, j: usize) -> f32 {
        let mut total = 0.0f32;
        for start in (0..a.columns).step_by(K_BLOCK) {
            let mut acc = 0.0f32;
            for p in start..(start + K_BLOCK).min(a.columns) {
                let x = a.data[i * a.row_stride + p * a.column_stride];
                let y = b.data[p * b.row_stride + j * b.column_stride];
                acc = x.mul_add(y, acc);
            }
            total = if start == 0 { acc } else { total + acc };
        }
        total
    }

    fn data(n: usize, purpose: u32) -> Vec<f32> {
        Philox::new(7, purpose, 0).normals(n, 1.0)
    }

    #[test]
    fn every_element_follows_the_contract_bit_for_bit() {
        for (m, n, k) in [
            (1, 1, 1),
            (1, 7, 5),
            (5, 1, 300),
            (2, 2, 2),
            (3, 17, 31),
            (16, 16, 256),
            (17, 33, 257),
            (64, 48, 513),
            (130, 9, 64),
            (49, 96, 1024),
            (300, 70, 40),
            (2, 512, 768),
        ] {
            let (x, y) = (data(m * k, 1), data(k * n, 2));
            let a_forms = [View::new(&x, m, k), View::new(&x, k, m).transposed()];
            let b_forms = [View::new(&y, k, n), View::new(&y, n, k).transposed()];
            for a in a_forms {
                for b in b_forms {
                    let mut out = vec![f32::NAN; m * n];
                    gemm(&mut Target { data: &mut out, row_stride: n }, a, b, false);
                    for i in 0..m {
                        for j in 0..n {
                            let want = model(a, b, i, j);
                            assert_eq!(out[i * n + j].to_bits(), want.to_bits(), "{m}x{n}x{k} at ({i}, {j})");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn sums_of_terms_too_small_to_be_held_keep_their_sign() {
        let small = |n, purpose| data(n, purpose).into_iter().map(|x| x * 1e-30).collect::<Vec<f32>>();
        for (m, n, k) in [(1, 1, 1), (3, 4, 1), (3, 4, 2), (1, 7, 5), (5, 1, 300), (17, 33, 257), (49, 96, 1024)] {
            let (x, y) = (small(m * k, 5), small(k * n, 6));
            let (a, b) = (View::new(&x, m, k), View::new(&y, k, n));
            let mut out = vec![f32::NAN; m * n];
            gemm(&mut Target { data: &mut out, row_stride: n }, a, b, false);
            for (at, got) in out.iter().enumerate() {
                let want = model(a, b, at / n, at % n);
                assert_eq!(got.to_bits(), want.to_bits(), "{m}x{n}x{k} at ({}, {})", at / n, at % n);
            }
        }
    }

    #[test]
    fn strided_targets_and_views_touch_only_their_columns() {
        let (x, y) = (data(6 * 20, 3), data(8 * 5, 4));
        let mut out = vec![9.0f32; 6 * 11];
        let a = View::strided(&x[4..], 6, 8, 20);
        let b = View::new(&y, 8, 5);
        gemm(&mut Target { data: &mut out[3..], row_stride: 11 }, a, b, false);
        for i in 0..6 {
            for c in 0..11 {
                let got = out[i * 11 + c];
                let want = if (3..8).contains(&c) { model(a, b, i, c - 3) } else { 9.0 };
                assert_eq!(got.to_bits(), want.to_bits());
            }
        }
    }

    #[test]
    fn an_empty_inner_dimension_gives_zeros() {
        let mut out = vec![f32::NAN; 6];
        gemm(&mut Target { data: &mut out, row_stride: 3 }, View::new(&[], 2, 0), View::new(&[], 0, 3), false);
        assert_eq!(out, vec![0.0; 6]);
    }
}
