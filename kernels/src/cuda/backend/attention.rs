//! Attention in FP32, from what is stored and to it: products and rows of scores, sequence by sequence, all heads
//! of one at once. The scores of a sequence lie in memory, `[heads][S][S]`. Kernels: `hopper/product.cu`.

use super::CudaBackend;
use super::elements::by_row;
use super::products::{Product, View};
use super::tensors::{Elements, Made};
use crate::backend::{AttentionState, BackendError};
use crate::cuda::device::run;
use crate::cuda::sources::PRODUCT;
use crate::ops::attention::AttentionShape;
use crate::tensor::Tensor;

/// Rows of one sequence, head 0, in each operand. A head's columns follow those of the head before.
struct Heads<'a> {
    s: &'a AttentionShape,
    q: View,
    kv: View,
    k_rope: View,
}

impl Heads<'_> {
    fn of(s: &AttentionShape, [q, kv, k_rope]: [u64; 3], first: usize) -> Heads<'_> {
        let view = |at: u64, row: usize| View::rows(at + 4 * (first * row) as u64, row);
        Heads { s, q: view(q, s.q_row()), kv: view(kv, s.kv_row()), k_rope: view(k_rope, s.rope) }
    }

    /// Columns between two heads of queries, of keys and values, and of results.
    fn steps(&self) -> [i64; 3] {
        [self.s.nope + self.s.rope, self.s.nope + self.s.value, self.s.value].map(|n| n as i64)
    }

    fn sizes(m: usize, n: usize, k: usize) -> [i32; 3] {
        [m, n, k].map(|n| n as i32)
    }

    /// A product to columns of a matrix like an operand.
    fn to(a: View, b: View, y: View, steps: [i64; 3], sizes: [i32; 3]) -> Product {
        Product { a, b, y: y.at, y_row: y.row, steps, sizes, add: 0 }
    }

    /// Scores, not scaled: both parts of the keys, one after the other.
    fn scores(&self, p: View) -> [Product; 2] {
        let (n, [q, kv, _], to_p) = (self.s.sequence, self.steps(), (self.s.sequence * self.s.sequence) as i64);
        let nope = Self::to(self.q, self.kv, p, [q, kv, to_p], Self::sizes(n, n, self.s.nope));
        let rope = self.q.from(self.s.nope);
        [nope, Product { add: 1, ..Self::to(rope, self.k_rope, p, [q, 0, to_p], Self::sizes(n, n, self.s.rope)) }]
    }
}

impl CudaBackend {
    pub(super) fn attention_forward(&self, [q, kv, k_rope]: [&Tensor; 3], s: &AttentionShape) -> Made<2> {
        Self::check([q, kv, k_rope], s);
        if self.is_planned(s) {
            return self.planned_forward([q, kv, k_rope], s);
        }
        let (tokens, n) = (q.rows(), s.sequence);
        let [q, kv, k_rope] = [self.wide(q)?, self.wide(kv)?, self.wide(k_rope)?];
        let addresses = [&q, &kv, &k_rope].map(Elements::address);
        let (o, lse) = (self.wide_room(tokens, s.o_row())?, self.wide_room(tokens, s.heads)?);
        let p = self.wide_room(if tokens == 0 { 0 } else { s.heads * n }, n)?;
        for first in (0..tokens).step_by(n) {
            let (heads, scores) = (Heads::of(s, addresses, first), View::rows(p.address(), n));
            for product in heads.scores(scores) {
                self.products(product, s.heads)?;
            }
            let (shape, sizes) = (by_row(s.heads * n), [s.heads, n, n, 0].map(|n| n as i32));
            let of_rows = lse.part(first * s.heads, n * s.heads);
            let ([count, rows, columns, past], p) = (sizes, &p.address());
            let (count, scale) = (&count, &s.scale);
            run!(self.gpu, PRODUCT, "softmax", shape, p, &of_rows.address(), count, &rows, &columns, &past, scale)?;
            let to = View::rows(o.address(), s.o_row()).after_rows(first);
            let ([_, step, out], values) = (heads.steps(), heads.kv.from(s.nope).transposed());
            let steps = [(n * n) as i64, step, out];
            self.products(Heads::to(scores, values, to, steps, Heads::sizes(n, s.value, n)), s.heads)?;
        }
        Ok([self.in_form(&o, self.low())?, lse])
    }

    /// Panics if the operands of an attention do not have its shape.
    fn check([q, kv, k_rope]: [&Tensor; 3], s: &AttentionShape) {
        assert!(q.rows().is_multiple_of(s.sequence), "{} rows in whole sequences of {}", q.rows(), s.sequence);
        assert_eq!([kv.rows(), k_rope.rows()], [q.rows(); 2], "rows of an attention");
        assert_eq!([q, kv, k_rope].map(Tensor::columns), [s.q_row(), s.kv_row(), s.rope], "columns of an attention");
    }

    pub(super) fn attention_gradients(&self, state: &AttentionState, d_o: &Tensor, s: &AttentionShape) -> Made<3> {
        let (tokens, n) = (state.q.rows(), s.sequence);
        let of = [&state.q, &state.kv, &state.k_rope];
        Self::check(of, s);
        let lengths = [&state.o, d_o, &state.lse].map(|x| (x.rows(), x.columns()));
        assert_eq!(lengths, [(tokens, s.o_row()), (tokens, s.o_row()), (tokens, s.heads)], "rows of results");
        if self.is_planned(s) {
            return self.planned_gradients(state, d_o, s);
        }
        let operands = [self.wide(of[0])?, self.wide(of[1])?, self.wide(of[2])?];
        let (o, d_o, lse) = (self.wide(&state.o)?, self.wide(d_o)?, self.wide(&state.lse)?);
        let of_scores = if tokens == 0 { 0 } else { s.heads * n };
        let (p, ds) = (self.wide_room(of_scores, n)?, self.wide_room(of_scores, n)?);
        let addresses = operands.each_ref().map(Elements::address);
        let room = |x: &Elements| self.wide_room(1, x.len());
        let [dq, dkv, dk_rope] = [room(&operands[0])?, room(&operands[1])?, room(&operands[2])?];
        for first in (0..tokens).step_by(n) {
            let out = [(&dq, s.q_row()), (&dkv, s.kv_row()), (&dk_rope, s.rope)]
                .map(|(x, row)| View::rows(x.address(), row).after_rows(first));
            let part = |x: &Elements, row: usize| x.part(first * row, n * row);
            let of = [part(&o, s.o_row()), part(&d_o, s.o_row()), part(&lse, s.heads)];
            self.sequence_gradients(&Heads::of(s, addresses, first), out, &of, [&p, &ds])?;
        }
        let low = self.low();
        Ok([self.in_form(&dq, low)?, self.in_form(&dkv, low)?, self.in_form(&dk_rope, low)?])
    }

    /// The gradients of one sequence, in the CPU's order: those of the shared keys add heads ascending.
    fn sequence_gradients(
        &self,
        heads: &Heads<'_>,
        [dq, dkv, dk_rope]: [View; 3],
        [o, d_o, lse]: &[Elements; 3],
        [p, ds]: [&Elements; 2],
    ) -> Result<(), BackendError> {
        let (s, n, [q_step, kv_step, o_step]) = (heads.s, heads.s.sequence, heads.steps());
        let (of_p, of_ds, step) = (View::rows(p.address(), n), View::rows(ds.address(), n), (n * n) as i64);
        for product in heads.scores(of_p) {
            self.products(product, s.heads)?;
        }
        let (shape, [count, rows, values]) = (by_row(s.heads * n), [s.heads, n, s.value].map(|n| n as i32));
        run!(self.gpu, PRODUCT, "shares", shape, &p.address(), &lse.address(), &count, &rows, &s.scale)?;
        let d_rows = View::rows(d_o.address(), s.o_row());
        let all = |product: Product| self.products(product, s.heads);
        let of_values = heads.kv.from(s.nope);
        all(Heads::to(d_rows, of_values, of_ds, [o_step, kv_step, step], Heads::sizes(n, n, s.value)))?;
        let (dv, by_key) = (dkv.from(s.nope), [step, o_step, kv_step]);
        all(Heads::to(of_p.transposed(), d_rows.transposed(), dv, by_key, Heads::sizes(n, s.value, n)))?;
        let (p, ds, d_view, o_view) = (&p.address(), &ds.address(), &d_o.address(), &o.address());
        run!(self.gpu, PRODUCT, "score_gradient", shape, p, ds, d_view, o_view, &count, &rows, &values, &s.scale)?;
        let (keys, k_rope) = (heads.kv.transposed(), heads.k_rope.transposed());
        all(Heads::to(of_ds, keys, dq, [step, kv_step, q_step], Heads::sizes(n, s.nope, n)))?;
        all(Heads::to(of_ds, k_rope, dq.from(s.nope), [step, 0, q_step], Heads::sizes(n, s.rope, n)))?;
        let by_query = [step, q_step, kv_step];
        all(Heads::to(of_ds.transposed(), heads.q.transposed(), dkv, by_query, Heads::sizes(n, s.nope, n)))?;
        let rotated = heads.q.from(s.nope);
        for head in 0..s.heads {
            let a = of_ds.after_rows(head * n);
            let b = rotated.from(head * q_step as usize);
            let product = Heads::to(a.transposed(), b.transposed(), dk_rope, [0; 3], Heads::sizes(n, s.rope, n));
            self.products(Product { add: i32::from(head > 0), ..product }, 1)?;
        }
        Ok(())
    }

    /// Attention over the compressed cache: the newest rows to all positions, all heads at once.
    pub(super) fn attention_over(
        &self,
        [q, latent, k_rope, kv_b]: [&Tensor; 4],
        s: &AttentionShape,
    ) -> Result<Elements, BackendError> {
        let ([t, n, c], heads) = ([q.rows(), latent.rows(), latent.columns()], s.heads);
        assert_eq!([k_rope.rows(), kv_b.columns()], [n, c], "positions and columns of a cache");
        assert_eq!([q.columns(), k_rope.columns(), kv_b.rows()], [s.q_row(), s.rope, s.kv_row()], "columns of a cache");
        let past = n.checked_sub(t).expect("the newest positions are among all");
        let (of_q, of_latent) = (self.wide(q)?, self.wide(latent)?);
        let (of_rope, of_b) = (self.wide(k_rope)?, self.wide(kv_b)?);
        let (q, latent) = (View::rows(of_q.address(), s.q_row()), View::rows(of_latent.address(), c));
        let (k_rope, b) = (View::rows(of_rope.address(), s.rope), View::rows(of_b.address(), c));
        let (asked, p) = (self.wide_room(heads * t, c)?, self.wide_room(heads * t, n)?);
        let (found, o) = (self.wide_room(heads * t, c)?, self.wide_room(t, s.o_row())?);
        let (of_asked, of_p) = (View::rows(asked.address(), c), View::rows(p.address(), n));
        let (of_found, of_o) = (View::rows(found.address(), c), View::rows(o.address(), s.o_row()));
        let [q_step, b_step, o_step] = [s.nope + s.rope, (s.nope + s.value) * c, s.value].map(|n| n as i64);
        let [rows_c, rows_n] = [t * c, t * n].map(|n| n as i64);
        let all = |product: Product| self.products(product, heads);
        all(Heads::to(q, b.transposed(), of_asked, [q_step, b_step, rows_c], Heads::sizes(t, c, s.nope)))?;
        all(Heads::to(of_asked, latent, of_p, [rows_c, 0, rows_n], Heads::sizes(t, n, c)))?;
        let by_rope = Heads::to(q.from(s.nope), k_rope, of_p, [q_step, 0, rows_n], Heads::sizes(t, n, s.rope));
        all(Product { add: 1, ..by_rope })?;
        let ([count, rows, columns, past], none) = ([heads, t, n, past].map(|n| n as i32), 0u64);
        let (shape, scale) = (by_row(heads * t), &s.scale);
        run!(self.gpu, PRODUCT, "softmax", shape, &p.address(), &none, &count, &rows, &columns, &past, scale)?;
        all(Heads::to(of_p, latent.transposed(), of_found, [rows_n, 0, rows_c], Heads::sizes(t, c, n)))?;
        let values = b.after_rows(s.nope);
        all(Heads::to(of_found, values, of_o, [rows_c, b_step, o_step], Heads::sizes(t, s.value, c)))?;
        self.in_form(&o, self.low())
    }
}
