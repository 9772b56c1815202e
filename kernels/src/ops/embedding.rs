//! Embedding: row `t` of `y_TD` is row `tokens[t]` of `table_VD`. The gradient adds rows in ascending `t`.

use crate::element::Element;

/// `tokens_T, table_VD -> y_TD`. Panics on a token outside the table: data is checked when it is read.
pub(crate) fn forward<E: Element>(tokens: &[u32], table: &[f32], d: usize) -> Vec<E> {
    let mut y = crate::wide::unwritten(tokens.len() * d);
    for (t, y) in tokens.iter().zip(y.chunks_exact_mut(d)) {
        E::store(&table[*t as usize * d..][..d], y);
    }
    y
}

/// `tokens_T, dy_TD -> dtable_VD`.
pub(crate) fn backward_weight<E: Element>(tokens: &[u32], dy: &[E], vocabulary: usize, d: usize) -> Vec<f32> {
    let mut dtable = vec![0.0; vocabulary * d];
    for (t, dy) in tokens.iter().zip(dy.chunks_exact(d)) {
        for (sum, dy) in dtable[*t as usize * d..][..d].iter_mut().zip(dy) {
            *sum += dy.value();
        }
    }
    dtable
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn agrees_with_the_reference() {
        let (v, d, tokens) = (5, 3, [4, 0, 4, 2]);
        let (table, dy) = (random(v * d, 1), random(tokens.len() * d, 2));
        let reference = |table: &[f64]| -> Vec<f64> {
            tokens.iter().flat_map(|t| table[*t as usize * d..][..d].to_vec()).collect()
        };
        assert_close(&forward::<f32>(&tokens, &table, d), &reference(&wide(&table)), 0.0, "y");
        let dtable = gradient(&table, |table| dot(&reference(table), &dy));
        assert_close(&backward_weight(&tokens, &dy, v, d), &dtable, 1e-6, "dtable");
    }
}
