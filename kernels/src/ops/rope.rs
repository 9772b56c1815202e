//! Rotary position embedding on interleaved pairs `(2i, 2i + 1)`, as DeepSeek-V3's own code has it.
//!
//! Rows are tokens of whole sequences one after another, so a row's position is its index modulo the
//! sequence length. Angles are made in f64 by a portable libm: equal bits on every machine. The
//! backward function is the rotation by the opposite angle (and the same factor).
//!
//! YaRN (Peng et al., arXiv 2309.00071; DeepSeek-V3 4.3) stretches a model to longer texts: slow
//! rotations are slowed down by a factor, fast ones stay, those between are mixed.

use crate::element::Element;
use std::cell::RefCell;
use std::rc::Rc;

/// Which columns of a row are rotated: `width` columns from `offset` on in each of `heads` pieces of
/// `head_width` columns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeShape {
    /// Pieces of a row.
    pub heads: usize,
    /// Columns of a piece.
    pub head_width: usize,
    /// First rotated column of a piece.
    pub offset: usize,
    /// Rotated columns of a piece; even.
    pub width: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Position of a sequence's first token.
    pub first: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched, if they are.
    pub yarn: Option<Yarn>,
}

/// Numbers of YaRN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How many times longer the texts are.
    pub factor: f64,
    /// Tokens of a sequence before.
    pub original: usize,
    /// Pairs with more turns than this over the original length stay.
    pub beta_fast: f64,
    /// Pairs with fewer are stretched whole.
    pub beta_slow: f64,
    /// Weight of the rotated parts' growth.
    pub mscale: f64,
    /// Weight of the growth of whole scores.
    pub mscale_all_dim: f64,
}

impl Yarn {
    fn growth(&self, weight: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * weight * libm::log(self.factor) + 1.0 }
    }

    /// What softmax scores are multiplied with.
    pub fn score_factor(&self) -> f64 {
        self.growth(self.mscale_all_dim) * self.growth(self.mscale_all_dim)
    }

    /// What the rotated columns are multiplied with.
    fn rotated_factor(&self) -> f64 {
        self.growth(self.mscale) / self.growth(self.mscale_all_dim)
    }

    /// The share of the stretched frequency in pair `pair` of `pairs`.
    fn share(&self, pair: usize, pairs: usize, theta: f64) -> f64 {
        let width = 2.0 * pairs as f64;
        let turns = |beta: f64| {
            width * libm::log(self.original as f64 / (beta * std::f64::consts::TAU)) / (2.0 * libm::log(theta))
        };
        let low = libm::floor(turns(self.beta_fast)).max(0.0);
        let high = libm::ceil(turns(self.beta_slow)).min(width - 1.0);
        let span = if high == low { 0.001 } else { high - low };
        ((pair as f64 - low) / span).clamp(0.0, 1.0)
    }
}

/// `(cos, sin)` by position and pair.
pub(crate) fn table(shape: &RopeShape) -> Vec<(f32, f32)> {
    let pairs = shape.width / 2;
    let frequency = |pair: usize| {
        let plain = libm::pow(shape.theta, -2.0 * pair as f64 / shape.width as f64);
        shape.yarn.map_or(plain, |yarn| {
            let share = yarn.share(pair, pairs, shape.theta);
            plain * (1.0 - share) + plain / yarn.factor * share
        })
    };
    let frequencies: Vec<f64> = (0..pairs).map(frequency).collect();
    let factor = shape.yarn.map_or(1.0, |yarn| yarn.rotated_factor());
    let at = |position: usize| {
        frequencies.iter().map(move |frequency| {
            let angle = position as f64 * frequency;
            ((libm::cos(angle) * factor) as f32, (libm::sin(angle) * factor) as f32)
        })
    };
    (shape.first..shape.first + shape.sequence).flat_map(at).collect()
}

/// A table, and the shape that it was made for.
type Kept = (RopeShape, Rc<[(f32, f32)]>);

/// The same, of which a thread keeps the last one: all layers ask for it.
fn kept_table(shape: &RopeShape) -> Rc<[(f32, f32)]> {
    thread_local! {
        static LAST: RefCell<Option<Kept>> = const { RefCell::new(None) };
    }
    // Pieces of a row share it.
    let key = RopeShape { heads: 1, head_width: shape.width, offset: 0, ..*shape };
    LAST.with_borrow_mut(|last| match last {
        Some((of, table)) if *of == key => Rc::clone(table),
        _ => {
            let table: Rc<[_]> = table(&key).into();
            *last = Some((key, Rc::clone(&table)));
            table
        }
    })
}

/// Rotates forward, or back when `inverse`.
pub(crate) fn rotate<E: Element>(x: &[E], shape: &RopeShape, inverse: bool) -> Vec<E> {
    let table = kept_table(shape);
    let (row, pairs) = (shape.heads * shape.head_width, shape.width / 2);
    let mut y = x.to_vec();
    for (t, y) in y.chunks_exact_mut(row).enumerate() {
        let angles = &table[(t % shape.sequence) * pairs..][..pairs];
        for head in y.chunks_exact_mut(shape.head_width) {
            for (pair, (cos, sin)) in head[shape.offset..][..shape.width].chunks_exact_mut(2).zip(angles) {
                let sin = if inverse { -sin } else { *sin };
                let (x, y) = (pair[0].value(), pair[1].value());
                (pair[0], pair[1]) = (E::nearest(x * cos - y * sin), E::nearest(x * sin + y * cos));
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    const SHAPE: RopeShape =
        RopeShape { heads: 2, head_width: 7, offset: 3, width: 4, sequence: 5, first: 0, theta: 10_000.0, yarn: None };

    /// The published model's extension to 128K: the technical report's section 4.3, worked out.
    #[test]
    fn yarn_mixes_the_published_pairs() {
        let yarn =
            Yarn { factor: 40.0, original: 4096, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0 };
        let share: Vec<f64> = (0..32).map(|pair| yarn.share(pair, 32, 10_000.0)).collect();
        assert!(share[..=10].iter().all(|s| *s == 0.0) && share[23..].iter().all(|s| *s == 1.0));
        assert!((share[12] - 2.0 / 13.0).abs() < 1e-15);
        assert!((yarn.score_factor() - 1.873_854_21).abs() < 1e-8);
        assert_eq!(yarn.rotated_factor(), 1.0);
        let shape = RopeShape { yarn: Some(Yarn { mscale: 0.5, ..yarn }), ..SHAPE };
        let x = random(2 * 7 * 5, 9);
        let (y, plain) = (rotate(&x, &shape, false), rotate(&x, &SHAPE, false));
        let factor = (1.0 + 0.05 * 40.0f64.ln()) / (1.0 + 0.1 * 40.0f64.ln());
        assert!((f64::from(y[3]) - f64::from(plain[3]) * factor).abs() < 1e-6, "position 0 is only scaled");
    }

    fn reference(x: &[f64], s: &RopeShape) -> Vec<f64> {
        let mut y = x.to_vec();
        let row = s.heads * s.head_width;
        for t in 0..x.len() / row {
            for h in 0..s.heads {
                for i in 0..s.width / 2 {
                    let angle = (t % s.sequence) as f64 / s.theta.powf(2.0 * i as f64 / s.width as f64);
                    let at = t * row + h * s.head_width + s.offset + 2 * i;
                    y[at] = x[at] * angle.cos() - x[at + 1] * angle.sin();
                    y[at + 1] = x[at] * angle.sin() + x[at + 1] * angle.cos();
                }
            }
        }
        y
    }

    #[test]
    fn a_sequence_can_begin_anywhere() {
        let x = random(5 * 14, 4);
        let whole = rotate(&x, &SHAPE, false);
        let late = rotate(&x[3 * 14..], &RopeShape { first: 3, sequence: 2, ..SHAPE }, false);
        assert!(same_bits(&late, &whole[3 * 14..]));
    }

    #[test]
    fn agrees_with_the_reference() {
        let n = 11 * 14;
        let (x, dy) = (random(n, 1), random(n, 2));
        assert_close(&rotate(&x, &SHAPE, false), &reference(&wide(&x), &SHAPE), 1e-6, "y");
        let dx = gradient(&x, |x| dot(&reference(x, &SHAPE), &dy));
        assert_close(&rotate(&dy, &SHAPE, true), &dx, 1e-6, "dx");
    }
}
