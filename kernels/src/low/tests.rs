//! Every path against scalar code, bit for bit; the layers against f64.

use super::linear::{Form, backward_input, backward_weight, forward};
use super::*;
use crate::backend::{Precision, Role};
use crate::element::{Bf16, Element, values as widened};
use crate::ops::testing::*;
use crate::tensor::Tensor;

/// The order of the tiles, in scalar code.
fn tiles(a: &[f32], b: &[f32]) -> f32 {
    let flush = |x: f32| if x.abs() < f32::MIN_POSITIVE { x * 0.0 } else { x };
    let mut total = 0.0f32;
    for (a, b) in a.chunks(K_BLOCK).zip(b.chunks(K_BLOCK)) {
        let (mut even, mut odd) = (0.0f32, 0.0f32);
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let sum = if i % 2 == 0 { &mut even } else { &mut odd };
            *sum = flush(flush(*a).mul_add(flush(*b), *sum));
        }
        total = flush(total + flush(even + odd));
    }
    total
}

/// The order of AVX-512-BF16: the second of a pair first.
fn pairs(a: &[f32], b: &[f32]) -> f32 {
    let flush = |x: f32| if x.abs() < f32::MIN_POSITIVE { x * 0.0 } else { x };
    let mut total = 0.0f32;
    let at = |x: &[f32], i: usize| flush(x.get(i).copied().unwrap_or(0.0));
    // Zeros up to whole blocks are added too: they make -0 a 0.
    for i in (0..a.len().next_multiple_of(K_BLOCK)).step_by(2) {
        total = flush(at(a, i + 1).mul_add(at(b, i + 1), total));
        total = flush(at(a, i).mul_add(at(b, i), total));
    }
    total
}

fn values(m: &Matrix) -> Vec<Vec<f32>> {
    m.data.chunks_exact(m.stride).take(m.rows).map(|r| widened(&r[..m.columns])).collect()
}

/// Numbers of very different sizes: some products are subnormal, some large.
fn ragged(rows: usize, columns: usize, name: u32) -> Matrix {
    let x: Vec<f32> = random(rows * columns, name)
        .iter()
        .enumerate()
        .map(|(i, x)| match i % 11 {
            0 => x * 1e-20,
            1 => x * 1e-38,
            2 => x * 1e12,
            _ => *x,
        })
        .collect();
    Matrix::round(&x, rows, columns, columns)
}

#[test]
fn every_path_follows_its_order_bit_for_bit() {
    println!("paths of this CPU: {:?}", Path::available());
    for (m, n, k) in [(1, 1, 1), (3, 5, 31), (32, 32, 32), (33, 70, 97), (64, 17, 256), (5, 40, 700)] {
        let (a, b) = (ragged(m, k, 1), ragged(n, k, 2));
        let (rows, columns) = (values(&a), values(&b));
        for path in Path::available() {
            let order = if path == Path::Avx512 { pairs } else { tiles };
            let check = |make: &dyn Fn(&mut Target<'_, f32>)| {
                let mut out = vec![f32::NAN; m * n];
                make(&mut Target { data: &mut out, stride: n });
                for (at, sum) in out.iter().enumerate() {
                    let (row, column) = (at / n, at % n);
                    let want = order(&rows[row], &columns[column]);
                    assert_eq!(sum.to_bits(), want.to_bits(), "{path:?} {m}x{n}x{k} ({row}, {column}): {sum} {want}");
                }
            };
            let (by_rows, turned) = (Columns::of_rows(b.view()), a.view().transposed());
            check(&|to| product(path, a.left(), &by_rows, to));
            check(&|to| product(path, a.left(), &Columns::of_columns(b.view().transposed().view()), to));
            check(&|to| product(path, Turned::of(path, turned.view()).left(), &by_rows, to));
            writes_its_elements_and_no_others(path, &a, &by_rows);
        }
    }
}

/// Results in BF16 are the rounded ones in f32; what lies beside the rows stays.
fn writes_its_elements_and_no_others(path: Path, a: &Matrix, b: &Columns) {
    let (m, n) = (a.rows, b.columns);
    let mut sums = vec![0.0f32; m * n];
    product(path, a.left(), b, &mut Target { data: &mut sums, stride: n });
    let beside = Bf16(0x4242);
    let (mut low, mut wide) = (vec![beside; m * (n + 5)], vec![f32::INFINITY; m * (n + 5)]);
    product(path, a.left(), b, &mut Target { data: &mut low, stride: n + 5 });
    product(path, a.left(), b, &mut Target { data: &mut wide, stride: n + 5 });
    for (row, sums) in sums.chunks_exact(n).enumerate() {
        let (low, wide) = (&low[row * (n + 5)..][..n + 5], &wide[row * (n + 5)..][..n + 5]);
        let rounded: Vec<Bf16> = sums.iter().map(|x| Bf16::nearest(*x)).collect();
        assert!(low[..n] == rounded && same_bits(&wide[..n], sums), "{path:?} {m} x {n}, row {row}");
        assert!(low[n..].iter().all(|x| *x == beside) && wide[n..].iter().all(|x| x.is_infinite()), "{path:?}");
    }
}

/// Terms before a row's block that are left out are as good as zeros.
#[test]
fn causal_products_leave_out_what_is_zero() {
    let (n, columns) = (70, 40);
    let mut a = ragged(n, n, 1);
    for (row, terms) in a.data.chunks_exact_mut(a.stride).take(n).enumerate() {
        terms[..row].fill(Bf16::default());
    }
    let b = Columns::of_rows(ragged(columns, n, 2).view());
    for path in Path::available() {
        let mut out = [vec![0.0f32; n * columns], vec![0.0; n * columns]];
        for (out, causal) in out.iter_mut().zip([Causal::No, Causal::TermsFrom]) {
            let to = &mut Target { data: out, stride: columns };
            Maker::new(path).product(a.left(), &b, causal, to);
        }
        assert!(same_bits(&out[0], &out[1]), "{path:?}");
    }
}

#[test]
fn a_matrix_turned_twice_is_itself() {
    for (r, c) in [(1, 1), (33, 70), (64, 31)] {
        let m = ragged(r, c, 3);
        let turned = m.view().transposed();
        assert_eq!((turned.rows, turned.columns), (c, r));
        assert_eq!(turned.view().transposed().data, m.data);
        let (m, t) = (values(&m), values(&turned));
        assert!((0..r).all(|i| (0..c).all(|j| m[i][j].to_bits() == t[j][i].to_bits())));
    }
}

/// Scaled products: each tile's sum from zero, then times the scales.
#[test]
fn scales_are_applied_after_every_tile() {
    let (m, n, k) = (35, 40, 300);
    let (x, w) = (random(m * k, 1), random(n * k, 2));
    for scaling in [Scaling::Exact, Scaling::PowerOfTwo] {
        let (a, b) = (Quantised::rows(&x, m, k, scaling), Quantised::blocks(&w, n, k));
        let (rows, columns) = (values(&a.values), values(&b.values));
        for path in Path::available() {
            let order = if path == Path::Avx512 { pairs } else { tiles };
            let mut out = vec![f32::NAN; m * n];
            let to = &mut Target { data: &mut out, stride: n };
            let columns_of = Columns::of_rows(b.values.view());
            scaled_product(path, (a.values.view(), &a.scales), (&columns_of, &b.scales, TILE), to);
            {
                for (at, sum) in out.iter().enumerate() {
                    let (row, column) = (at / n, at % n);
                    let (r, c) = (&rows[row], &columns[column]);
                    let mut want = 0.0f32;
                    for t in 0..k.div_ceil(TILE) {
                        let at = t * TILE..k.min((t + 1) * TILE);
                        want += order(&r[at.clone()], &c[at]) * (a.scales[row * 3 + t] * b.scales[t]);
                    }
                    assert_eq!(sum.to_bits(), want.to_bits(), "{path:?} {scaling:?}");
                }
            }
        }
        if scaling == Scaling::PowerOfTwo {
            assert!(a.scales.iter().all(|s| s.to_bits() & 0x7f_ffff == 0));
        }
    }
}

/// Relative error of the whole result.
fn error(got: &[f32], want: &[f64]) -> f64 {
    let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let difference = squares(&mut got.iter().zip(want).map(|(g, w)| f64::from(*g) - w));
    (difference / squares(&mut want.iter().copied())).sqrt()
}

/// All three products of all roles against f64. BF16 rounds operands and results by 2^-9 at most, some
/// 0.3% together; E4M3 has 3 bits, some 2.6% for normal numbers on each side, so 3.7% for both.
#[test]
fn layers_are_as_close_as_their_precision() {
    let (t, o, i) = (70, 200, 150);
    let (x, w, dy) = (random(t * i, 1), random(o * i, 2), random(t * o, 3));
    let f =
        |n: usize, m: usize, k: usize, a: &dyn Fn(usize, usize) -> f32, b: &dyn Fn(usize, usize) -> f32| -> Vec<f64> {
            let sum = |r, c| (0..k).map(|p| f64::from(a(r, p)) * f64::from(b(p, c))).sum();
            (0..n * m).map(|at| sum(at / m, at % m)).collect()
        };
    let want = [
        f(t, o, i, &|r, p| x[r * i + p], &|p, c| w[c * i + p]),
        f(t, i, o, &|r, p| dy[r * o + p], &|p, c| w[p * i + c]),
        f(o, i, t, &|r, p| dy[p * o + r], &|p, c| x[p * i + c]),
    ];
    let tensor = |rows, columns, data: &[f32]| Tensor::from_vec(rows, columns, data.to_vec());
    for role in [Role::Projection, Role::Output, Role::ExpertIn, Role::ExpertOut, Role::Head] {
        for precision in [Precision::Bf16, Precision::Fp8] {
            let form = Form::of(precision, role).unwrap();
            let limit = if form == Form::Rounded { 4e-3 } else { 5e-2 };
            for path in Path::available() {
                let (x, w, dy) = (tensor(t, i, &x), tensor(o, i, &w), tensor(t, o, &dy));
                let (mut y, mut dx) = (vec![Bf16::default(); t * o], vec![Bf16::default(); t * i]);
                forward(path, form, &x, &w, &mut y);
                backward_input(path, form, &dy, &w, &mut dx);
                let got = [widened(&y), widened(&dx), backward_weight(path, form, &dy, &x)];
                for (n, (got, want)) in got.iter().zip(&want).enumerate() {
                    let error = error(got, want);
                    assert!(error < limit, "{role:?} {precision} {path:?} product {n}: {error}");
                    assert!(form == Form::Rounded || error > limit / 10.0, "E4M3 is used");
                }
            }
        }
    }
    assert_eq!(Form::of(Precision::Fp8, Role::Gate), None);
}

/// A class is named by its bits: precisions differ, and so do paths with other bits.
#[test]
fn classes_are_told_apart() {
    use crate::backend::Backend;
    let classes = [Precision::Fp32, Precision::Bf16, Precision::Fp8].map(|p| crate::cpu::CpuBackend::new(p).class().0);
    assert!(classes[0].starts_with("cpu fp32 ") && classes[2].starts_with("cpu fp8 "), "{classes:?}");
    assert_ne!(classes[1][9..], classes[2][8..]);
}

/// An expert that got no token has no rows, and gradients of zero.
#[test]
fn no_rows_are_no_trouble() {
    for precision in [Precision::Bf16, Precision::Fp8] {
        let form = Form::of(precision, Role::ExpertIn).unwrap();
        for path in Path::available() {
            let (x, w, dy) = (
                Tensor::from_vec(0, 40, vec![]),
                Tensor::from_vec(50, 40, random(2000, 1)),
                Tensor::from_vec(0, 50, vec![]),
            );
            forward::<Bf16>(path, form, &x, &w, &mut []);
            backward_input::<Bf16>(path, form, &dy, &w, &mut []);
            assert!(backward_weight(path, form, &dy, &x) == vec![0.0; 2000], "{path:?} {precision}");
        }
    }
}

/// Rows that are stored in BF16 are read in place, ragged ones and those in the middle of others too.
#[test]
fn rows_in_place_give_what_their_copies_give() {
    for (rows, columns) in [(70, 64), (33, 96), (1, 32), (20, 40)] {
        let whole: Vec<Bf16> = random((rows + 9) * columns, 1).iter().map(|x| Bf16::nearest(*x)).collect();
        let stored = Tensor::bf16(rows + 9, columns, std::sync::Arc::new(whole)).view(5, rows);
        let copy = Tensor::from_vec(rows, columns, stored.values().into_owned());
        let w = Tensor::from_vec(50, columns, random(50 * columns, 2));
        let dy = Tensor::from_vec(rows, 50, random(rows * 50, 3));
        for path in Path::available() {
            let mut y = [vec![0.0f32; rows * 50], vec![0.0; rows * 50]];
            forward(path, Form::Rounded, &stored, &w, &mut y[0]);
            forward(path, Form::Rounded, &copy, &w, &mut y[1]);
            assert!(same_bits(&y[0], &y[1]), "{path:?} {rows} x {columns}");
            let stack =
                Tensor::stacked(&[stored.view(0, 1), stored.view(0, 0), stored.view(1, rows - 1), stored.clone()]);
            let copies = Tensor::from_vec(2 * rows, columns, stack.values().into_owned());
            let twice = Tensor::from_vec(2 * rows, 50, random(2 * rows * 50, 4));
            let dw = [&stack, &copies].map(|x| backward_weight(path, Form::Rounded, &twice, x));
            assert!(same_bits(&dw[0], &dw[1]), "{path:?} {rows} x {columns}, stacked");
            let dw = [&stored, &copy].map(|x| backward_weight(path, Form::Rounded, &dy, x));
            assert!(same_bits(&dw[0], &dw[1]), "{path:?} {rows} x {columns}");
            let turned = [&stored, &copy].map(|x| backward_weight(path, Form::Rounded, x, &dy));
            assert!(same_bits(&turned[0], &turned[1]), "{path:?} {rows} x {columns}");
        }
    }
}
