//! Rotary position embedding on interleaved pairs `(2i, 2i + 1)`, as DeepSeek-V3's own code has it.
//!
//! Rows are tokens of whole sequences one after another, so a row's position is its index modulo the
//! sequence length. Angles are made in f64 by a portable libm: equal bits on every machine. The
//! backward function is the rotation by the opposite angle.

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
    /// Base of the frequencies.
    pub theta: f64,
}

/// `(cos, sin)` by position and pair.
fn table(shape: &RopeShape) -> Vec<(f32, f32)> {
    let frequency = |pair: usize| libm::pow(shape.theta, -2.0 * pair as f64 / shape.width as f64);
    let frequencies: Vec<f64> = (0..shape.width / 2).map(frequency).collect();
    let at = |position: usize| {
        frequencies.iter().map(move |frequency| {
            let angle = position as f64 * frequency;
            (libm::cos(angle) as f32, libm::sin(angle) as f32)
        })
    };
    (0..shape.sequence).flat_map(at).collect()
}

/// Rotates forward, or back when `inverse`.
pub(crate) fn rotate(x: &[f32], shape: &RopeShape, inverse: bool) -> Vec<f32> {
    let table = table(shape);
    let (row, pairs) = (shape.heads * shape.head_width, shape.width / 2);
    let mut y = x.to_vec();
    for (t, y) in y.chunks_exact_mut(row).enumerate() {
        let angles = &table[(t % shape.sequence) * pairs..][..pairs];
        for head in y.chunks_exact_mut(shape.head_width) {
            for (pair, (cos, sin)) in head[shape.offset..][..shape.width].chunks_exact_mut(2).zip(angles) {
                let sin = if inverse { -sin } else { *sin };
                (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    const SHAPE: RopeShape = RopeShape { heads: 2, head_width: 7, offset: 3, width: 4, sequence: 5, theta: 10_000.0 };

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
    fn agrees_with_the_reference() {
        let n = 11 * 14;
        let (x, dy) = (random(n, 1), random(n, 2));
        assert_close(&rotate(&x, &SHAPE, false), &reference(&wide(&x), &SHAPE), 1e-6, "y");
        let dx = gradient(&x, |x| dot(&reference(x, &SHAPE), &dy));
        assert_close(&rotate(&dy, &SHAPE, true), &dx, 1e-6, "dx");
    }
}
