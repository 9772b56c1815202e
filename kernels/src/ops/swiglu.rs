//! SwiGLU: `h = silu(gate) * up`, element by element. `gate_TI`, `up_TI`, `h_TI`.

use crate::element::{Element, PIECE, in_pieces};
use crate::math::sigmoid;
use crate::wide;

/// `gate, up -> h`.
pub(crate) fn forward<E: Element>(gate: &[E], up: &[E]) -> Vec<E> {
    assert_eq!(gate.len(), up.len(), "elements of gate and up");
    let mut h = wide::unwritten(gate.len());
    wide::run(
        #[inline(always)]
        || {
            in_pieces(&mut h, |at, h| {
                for (h, (g, u)) in h.iter_mut().zip(gate[at.clone()].iter().zip(&up[at])) {
                    let g = g.value();
                    *h = (g * sigmoid(g)) * u.value();
                }
            });
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
            let mut made = [[0.0f32; PIECE]; 3];
            for at in (0..gate.len()).step_by(PIECE) {
                let at = at..gate.len().min(at + PIECE);
                let [g, u, dh] = [gate, up, dh].map(|x| &x[at.clone()]);
                let [of_h, of_gate, of_up] = made.each_mut().map(|made| &mut made[..g.len()]);
                let out = of_h.iter_mut().zip(of_gate.iter_mut()).zip(of_up.iter_mut());
                for (((g, u), dh), ((h, dgate), dup)) in g.iter().zip(u).zip(dh).zip(out) {
                    let (g, u, dh) = (g.value(), u.value(), dh.value());
                    let s = sigmoid(g);
                    *h = (g * s) * u;
                    *dup = dh * (g * s);
                    *dgate = (dh * u) * (s * (1.0 + g * (1.0 - s)));
                }
                E::store(of_h, &mut h[at.clone()]);
                E::store(of_gate, &mut dgate[at.clone()]);
                E::store(of_up, &mut dup[at]);
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
