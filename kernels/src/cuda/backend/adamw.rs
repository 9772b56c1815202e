//! AdamW and what is measured beside it, with the CPU's bits (`ops/adamw.rs`). Kernels: `hopper/adamw.cu`.

use super::CudaBackend;
use super::tensors::{Buffer, Elements};
use crate::backend::BackendError;
use crate::cuda::device::run;
use crate::cuda::sources::ADAMW;
use crate::ops::adamw::{AdamW, NORM_CHUNK};
use crate::tensor::Tensor;
use cudarc::driver::DeviceRepr;

/// Elements of a block of threads.
const BLOCK: usize = 8 * 256;
/// Chains of a chunk's squared sum.
const CHAINS: usize = 8;

/// The kernel's argument.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Numbers([f32; 9]);

// SAFETY: plain data in the kernel's layout.
unsafe impl DeviceRepr for Numbers {}

impl CudaBackend {
    /// One step, from a state (a weight, its moments, the average if there is one) and the gradient: the next state, stored alike,
    /// with the sums of the state that was read and of the next. Waits for the sums.
    pub fn adamw_step(
        &self,
        state: &[Tensor],
        g: &Tensor,
        a: &AdamW,
    ) -> Result<(Vec<Tensor>, [u128; 2]), BackendError> {
        let ([w, m, v], average) = state.split_first_chunk().expect("a weight and its moments");
        let (rows, columns, count) = (w.rows(), w.columns(), w.rows() * w.columns());
        let alike = state.iter().chain([g]).all(|x| (x.rows(), x.columns()) == (rows, columns));
        assert!(alike && average.len() == usize::from(a.ema.is_some()), "parts of a state: {state:?}");
        let low = match self.behind(m) {
            Some(Buffer::Matrix(elements)) => elements.is_low(),
            _ => m.is_bf16(),
        };
        let parts = [(w, false), (m, low), (v, low)].into_iter().chain(average.iter().map(|x| (x, false)));
        let old = parts.map(|(x, low)| self.elements(x, low)).collect::<Result<Vec<_>, _>>()?;
        let new = old.iter().map(|x| self.room_in(count, x.is_low())).collect::<Result<Vec<_>, _>>()?;
        let (g, mut sums, shape) = (self.wide(g)?, self.gpu.zeros::<u64>(6)?, (count.div_ceil(BLOCK), 256, 0));
        let at = |x: &[Elements], part: usize| x.get(part).map_or(0, Elements::address);
        let ([w, m, v, average], next) =
            ([0, 1, 2, 3].map(|part| at(&old, part)), [0, 1, 2, 3].map(|part| at(&new, part)));
        let (kernels, g, n) = (&ADAMW[usize::from(low)], g.address(), count as u64);
        let AdamW { lr, beta1, beta2, eps, decay, clip, correction1, correction2, ema } = *a;
        let numbers = Numbers([lr, beta1, beta2, eps, decay, clip, correction1, correction2, ema.unwrap_or(0.0)]);
        let to = (&next[0], &next[1], &next[2], &next[3]);
        run!(
            self.gpu, *kernels, "adamw", shape, &w, &m, &v, &average, &g, to.0, to.1, to.2, to.3, &mut sums, &n,
            &numbers
        )?;
        let sums = self.gpu.download(&sums)?;
        let whole = |part: &[u64]| {
            let [low, middle, high] = [0, 1, 2].map(|i| u128::from(part[i]));
            low.wrapping_add(middle << 32).wrapping_add(high << 64)
        };
        let next = new.into_iter().map(|x| x.tensor(rows, columns)).collect();
        Ok((next, [whole(&sums[..3]), whole(&sums[3..])]))
    }

    /// Squared sums of a gradient, one for each [`NORM_CHUNK`] elements. Waits for them.
    pub fn square_sums(&self, g: &Tensor) -> Result<Vec<f64>, BackendError> {
        let (of_g, chunks) = (self.wide(g)?, (g.rows() * g.columns()).div_ceil(NORM_CHUNK));
        let (mut sums, n) = (self.gpu.room::<f64>(chunks)?, of_g.len() as u64);
        let (shape, from) = (((chunks * CHAINS).div_ceil(256), 256, 0), &of_g.address());
        run!(self.gpu, ADAMW[0], "square_sums", shape, from, &mut sums, &n)?;
        self.gpu.download(&sums)
    }
}
