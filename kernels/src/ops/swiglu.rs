//! SwiGLU: `h = silu(gate) * up`, element by element. `gate_TI`, `up_TI`, `h_TI`.

use crate::element::Element;
use crate::math::sigmoid;
use crate::wide;

/// `gate, up -> h`.
pub(crate) fn forward<E: Element>(gate: &[E], up: &[E]) -> Vec<E> {
    assert_eq!(gate.len(), up.len(), "elements of gate and up");
    let mut h = wide::unwritten(gate.len());
    wide::run(
        #[inline(always)]
        || {
            for ((h, g), u) in h.iter_mut().zip(gate).zip(up) {
                let g = g.value();
                *h = E::nearest((g * sigmoid(g)) * u.value());
            }
        },
    );
    h
}

/// `gate, up, dh -> (h, dgate, dup)`: the result is made again, not kept.
pub(crate) fn backward<E: Element>(gate: &[E], up: &[E], dh: &[E]) -> [Vec<E>; 3] {
    assert!(gate.len() == up.len() && gate.len() == dh.len(), "elements of gate, up and their gradient");
    let [mut h, mut dgate, mut dup] = [(); 3].map(|()| wide::unwritten(gate.len()));
    wide::run(
        #[inline(always)]
        || {
            let out = h.iter_mut().zip(&mut dgate).zip(&mut dup);
            for (((g, u), dh), ((h, dgate), dup)) in gate.iter().zip(up).zip(dh).zip(out) {
                let (g, u, dh) = (g.value(), u.value(), dh.value());
                let s = sigmoid(g);
                *h = E::nearest((g * s) * u);
                *dup = E::nearest(dh * (g * s));
                *dgate = E::nearest((dh * u) * (s * (1.0 + g * (1.0 - s))));
            }
        },
    );
    [h, dgate, dup]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn reference(g: &[f64], u: &[f64]) -> Vec<f64> {
        g.iter().zip(u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    }

    #[test]
    fn agrees_with_the_reference() {
        let (g, u, dh) = (random(53, 1), random(53, 2), random(53, 3));
        assert_close(&forward(&g, &u), &reference(&wide(&g), &wide(&u)), 1e-6, "h");
        let [h, dg, du] = backward(&g, &u, &dh);
        assert_eq!(h, forward(&g, &u));
        assert_close(&dg, &gradient(&g, |g| dot(&reference(g, &wide(&u)), &dh)), 1e-6, "dgate");
        assert_close(&du, &gradient(&u, |u| dot(&reference(&wide(&g), u), &dh)), 1e-6, "dup");
    }
}
