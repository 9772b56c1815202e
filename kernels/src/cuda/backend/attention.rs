//! Attention in FP32: products and rows of scores, sequence by sequence, all heads of one at once. The scores of a sequence lie in
//! memory, `[heads][S][S]`. Kernels: `hopper/fp32_product.cu`.

use super::CudaBackend;
use super::elements::by_row;
use super::products::{Product, View};
use super::tensors::{Floats, Made};
use crate::backend::{AttentionState, BackendError};
use crate::cuda::device::run;
use crate::cuda::sources::FP32_PRODUCT;
use crate::ops::attention::AttentionShape;
use crate::tensor::Tensor;
use cudarc::driver::CudaSlice;

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
        let (tokens, n) = (q.rows(), s.sequence);
        let [q, kv, k_rope] = self.operands([q, kv, k_rope], s)?;
        let addresses = [&q, &kv, &k_rope].map(|x| x.address(&self.gpu));
        let (mut o, mut lse) = (self.room(tokens, s.o_row())?, self.room(tokens, s.heads)?);
        let mut p = self.room(if tokens == 0 { 0 } else { s.heads * n }, n)?;
        for first in (0..tokens).step_by(n) {
            let (heads, scores) = (Heads::of(s, addresses, first), self.view(&mut p, n));
            for product in heads.scores(scores) {
                self.products(product, s.heads)?;
            }
            let (shape, sizes) = (by_row(s.heads * n), [s.heads, n, n, 0].map(|n| n as i32));
            let mut of_rows = lse.slice_mut(first * s.heads..(first + n) * s.heads);
            let ([count, rows, columns, past], p) = (sizes, &mut p);
            let (count, scale) = (&count, &s.scale);
            run!(self.gpu, FP32_PRODUCT, "softmax", shape, p, &mut of_rows, count, &rows, &columns, &past, scale)?;
            let to = self.view(&mut o, s.o_row());
            let ([_, step, out], values) = (heads.steps(), heads.kv.from(s.nope).transposed());
            let to = View { at: to.at + 4 * (first * s.o_row()) as u64, ..to };
            let steps = [(n * n) as i64, step, out];
            self.products(Heads::to(scores, values, to, steps, Heads::sizes(n, s.value, n)), s.heads)?;
        }
        Ok([o, lse].map(Floats::new))
    }

    /// The operands of an attention, whose shapes are the caller's promise.
    fn operands(&self, [q, kv, k_rope]: [&Tensor; 3], s: &AttentionShape) -> Made<3> {
        assert!(q.rows().is_multiple_of(s.sequence), "{} rows in whole sequences of {}", q.rows(), s.sequence);
        assert_eq!([kv.rows(), k_rope.rows()], [q.rows(); 2], "rows of an attention");
        assert_eq!([q, kv, k_rope].map(Tensor::columns), [s.q_row(), s.kv_row(), s.rope], "columns of an attention");
        Ok([self.floats(q)?, self.floats(kv)?, self.floats(k_rope)?])
    }

    fn view(&self, x: &mut CudaSlice<f32>, columns: usize) -> View {
        use cudarc::driver::DevicePtrMut;
        View::rows(x.device_ptr_mut(&self.gpu.stream).0, columns)
    }

    pub(super) fn attention_gradients(&self, state: &AttentionState, d_o: &Tensor, s: &AttentionShape) -> Made<3> {
        let (tokens, n) = (state.q.rows(), s.sequence);
        let operands = self.operands([&state.q, &state.kv, &state.k_rope], s)?;
        let (o, d_o, lse) = (self.floats(&state.o)?, self.floats(d_o)?, self.floats(&state.lse)?);
        assert_eq!(
            [o.len(), d_o.len(), lse.len()],
            [s.o_row(), s.o_row(), s.heads].map(|n| n * tokens),
            "rows of results"
        );
        let room = |x: &Floats| self.gpu.room(x.len());
        let mut made = [room(&operands[0])?, room(&operands[1])?, room(&operands[2])?];
        let of_scores = if tokens == 0 { 0 } else { s.heads * n };
        let (mut p, mut ds) = (self.room(of_scores, n)?, self.room(of_scores, n)?);
        let addresses = operands.each_ref().map(|x| x.address(&self.gpu));
        let results = [s.q_row(), s.kv_row(), s.rope];
        for first in (0..tokens).step_by(n) {
            let heads = Heads::of(s, addresses, first);
            let mut at = 0;
            let out = made.each_mut().map(|x| {
                at += 1;
                let view = self.view(x, results[at - 1]);
                View { at: view.at + 4 * (first * results[at - 1]) as u64, ..view }
            });
            let part = |x: &Floats, row: usize| x.part(first * row, n * row);
            let (o, d_o) = (part(&o, s.o_row()), part(&d_o, s.o_row()));
            self.sequence_gradients(&heads, out, [&o, &d_o, &part(&lse, s.heads)], [&mut p, &mut ds])?;
        }
        Ok(made.map(Floats::new))
    }

    /// The gradients of one sequence, in the CPU's order: those of the shared keys add heads ascending.
    fn sequence_gradients(
        &self,
        heads: &Heads<'_>,
        [dq, dkv, dk_rope]: [View; 3],
        [o, d_o, lse]: [&Floats; 3],
        [p, ds]: [&mut CudaSlice<f32>; 2],
    ) -> Result<(), BackendError> {
        let (s, n, [q_step, kv_step, o_step]) = (heads.s, heads.s.sequence, heads.steps());
        let (of_p, of_ds, step) = (self.view(p, n), self.view(ds, n), (n * n) as i64);
        for product in heads.scores(of_p) {
            self.products(product, s.heads)?;
        }
        let (shape, [count, rows, values]) = (by_row(s.heads * n), [s.heads, n, s.value].map(|n| n as i32));
        run!(self.gpu, FP32_PRODUCT, "shares", shape, &mut *p, &lse.view(), &count, &rows, &s.scale)?;
        let d_rows = self.whole(d_o, s.o_row());
        let all = |product: Product| self.products(product, s.heads);
        let of_values = heads.kv.from(s.nope);
        all(Heads::to(d_rows, of_values, of_ds, [o_step, kv_step, step], Heads::sizes(n, n, s.value)))?;
        let (dv, by_key) = (dkv.from(s.nope), [step, o_step, kv_step]);
        all(Heads::to(of_p.transposed(), d_rows.transposed(), dv, by_key, Heads::sizes(n, s.value, n)))?;
        let (d_view, o_view) = (&d_o.view(), &o.view());
        run!(
            self.gpu,
            FP32_PRODUCT,
            "score_gradient",
            shape,
            &*p,
            ds,
            d_view,
            o_view,
            &count,
            &rows,
            &values,
            &s.scale
        )?;
        let (keys, k_rope) = (heads.kv.transposed(), heads.k_rope.transposed());
        all(Heads::to(of_ds, keys, dq, [step, kv_step, q_step], Heads::sizes(n, s.nope, n)))?;
        all(Heads::to(of_ds, k_rope, dq.from(s.nope), [step, 0, q_step], Heads::sizes(n, s.rope, n)))?;
        let by_query = [step, q_step, kv_step];
        all(Heads::to(of_ds.transposed(), heads.q.transposed(), dkv, by_query, Heads::sizes(n, s.nope, n)))?;
        let rotated = heads.q.from(s.nope);
        for head in 0..s.heads {
            let a = View { at: of_ds.at + 4 * (head * n * n) as u64, ..of_ds };
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
    ) -> Result<Floats, BackendError> {
        let ([t, n, c], heads) = ([q.rows(), latent.rows(), latent.columns()], s.heads);
        assert_eq!([k_rope.rows(), kv_b.columns()], [n, c], "positions and columns of a cache");
        assert_eq!([q.columns(), k_rope.columns(), kv_b.rows()], [s.q_row(), s.rope, s.kv_row()], "columns of a cache");
        let past = n.checked_sub(t).expect("the newest positions are among all");
        let (of_q, of_latent) = (self.floats(q)?, self.floats(latent)?);
        let (of_rope, of_b) = (self.floats(k_rope)?, self.floats(kv_b)?);
        let (q, latent) = (self.whole(&of_q, s.q_row()), self.whole(&of_latent, c));
        let (k_rope, b) = (self.whole(&of_rope, s.rope), self.whole(&of_b, c));
        let (mut asked, mut p) = (self.room(heads * t, c)?, self.room(heads * t, n)?);
        let (mut found, mut o) = (self.room(heads * t, c)?, self.room(t, s.o_row())?);
        let views =
            (self.view(&mut asked, c), self.view(&mut p, n), self.view(&mut found, c), self.view(&mut o, s.o_row()));
        let (of_asked, of_p, of_found, of_o) = views;
        let [q_step, b_step, o_step] = [s.nope + s.rope, (s.nope + s.value) * c, s.value].map(|n| n as i64);
        let [rows_c, rows_n] = [t * c, t * n].map(|n| n as i64);
        let all = |product: Product| self.products(product, heads);
        all(Heads::to(q, b.transposed(), of_asked, [q_step, b_step, rows_c], Heads::sizes(t, c, s.nope)))?;
        all(Heads::to(of_asked, latent, of_p, [rows_c, 0, rows_n], Heads::sizes(t, n, c)))?;
        let by_rope = Heads::to(q.from(s.nope), k_rope, of_p, [q_step, 0, rows_n], Heads::sizes(t, n, s.rope));
        all(Product { add: 1, ..by_rope })?;
        let ([count, rows, columns, past], none) = ([heads, t, n, past].map(|n| n as i32), 0u64);
        let (shape, scale) = (by_row(heads * t), &s.scale);
        run!(self.gpu, FP32_PRODUCT, "softmax", shape, &mut p, &none, &count, &rows, &columns, &past, scale)?;
        all(Heads::to(of_p, latent.transposed(), of_found, [rows_n, 0, rows_c], Heads::sizes(t, c, n)))?;
        let values = View { at: b.at + 4 * (s.nope * c) as u64, ..b };
        all(Heads::to(of_found, values, of_o, [rows_c, b_step, o_step], Heads::sizes(t, s.value, c)))?;
        Ok(Floats::new(o))
    }
}
