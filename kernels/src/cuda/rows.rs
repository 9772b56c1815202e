//! What is done to rows at the speed of memory: quantise, norms, SwiGLU, dispatch, combine, and the turn of tokens into
//! columns. Layouts and roundings are told in the files of `hopper/`.

use super::device::{Gpu, launch_of, pointer, run};
use super::memory::Memory;
use super::products::{Blocks, Codes, Groups, TILE};
use super::sources::{BLOCKS, NORM, PERMUTE, QUANTISE, SWIGLU, TURN};
use crate::backend::BackendError;
use cudarc::driver::{CudaView, DevicePtr, DeviceSlice};
use std::borrow::Borrow;

/// Warps of a block, except in norms.
const WARPS: usize = 8;
/// Rows of a strip, as the gradient of a norm's weights has them.
const STRIP: usize = 128;

/// Blocks for warps that take `rows` rows of a tile each.
fn by_tiles(rows: usize, columns: usize, each: usize) -> usize {
    (rows.div_ceil(each) * (columns / TILE)).div_ceil(WARPS)
}

/// Choices of a token, at most.
pub(super) const CHOICES_MAX: usize = 32;

/// Where tokens go, and come from.
#[derive(Debug)]
pub struct Places {
    top_k: usize,
    group_size: usize,
    /// Rows of the experts.
    rows: usize,
    tokens: usize,
    place: Memory<i32>,
    experts: Memory<i32>,
}

impl Places {
    /// `place` holds the row of each of a token's choices among `rows`, or -1; `experts` their numbers, ascending; both
    /// `[tokens][top_k]`. Panics if a place is beyond the rows, or if there are more than 32 choices or none.
    pub fn new(
        gpu: &Gpu,
        (top_k, group_size, rows): (usize, usize, usize),
        place: &[i32],
        experts: &[i32],
    ) -> Result<Self, BackendError> {
        assert!((1..=CHOICES_MAX).contains(&top_k) && group_size > 0, "{top_k} choices among groups of {group_size}");
        assert!(
            place.len() == experts.len() && place.len().is_multiple_of(top_k),
            "a place and an expert of each choice"
        );
        assert!(place.iter().all(|at| *at >= -1 && *at < rows as i32), "places below {rows}");
        let (tokens, place, experts) = (place.len() / top_k, gpu.upload(place)?, gpu.upload(experts)?);
        Ok(Self { top_k, group_size, rows, tokens, place, experts })
    }
}

impl Gpu {
    /// Room for codes and scales.
    pub fn codes(&self, rows: usize, columns: usize) -> Result<Codes, BackendError> {
        let (codes, scales) = (self.room(rows * columns)?, self.room(Codes::scale_count(rows, columns))?);
        Ok(Codes::new(rows, columns, codes, scales))
    }

    /// `x_RC` to E4M3; scales are powers of two if `power`.
    pub fn quantise_rows(&self, x: &impl DevicePtr<u16>, out: &mut Codes, power: bool) -> Result<(), BackendError> {
        assert_eq!(x.len(), out.rows * out.columns, "elements of a matrix");
        let (rows, columns) = (out.rows, out.columns);
        let ([r, c, stride], power) = (out.sizes(), i32::from(power));
        let x = x.device_ptr(&self.stream).0;
        run!(
            self,
            QUANTISE,
            "quantise_rows",
            (by_tiles(rows, columns, 8), 256, 0),
            &x,
            &mut out.codes,
            &mut out.scales,
            &r,
            &c,
            &stride,
            &power
        )
    }

    /// Room for `count` weights `w_OI` in E4M3 in blocks, in both orders that products read: `[O][I]`, and `[I][O]`, with rows and
    /// columns up to what products take.
    pub fn blocks(&self, count: usize, [rows, columns]: [usize; 2]) -> Result<[Blocks; 2], BackendError> {
        let tiles = rows.div_ceil(TILE) * columns.div_ceil(TILE);
        let blocks = |rows: usize, columns: usize| {
            let (rows, columns) = (rows.next_multiple_of(8), columns.next_multiple_of(TILE));
            let (codes, scales) = (self.room(count * rows * columns)?, self.room(count * tiles)?);
            Ok(Blocks::new(count, rows, columns, codes, scales))
        };
        Ok([blocks(rows, columns)?, blocks(columns, rows)?])
    }

    /// Weights `w_OI` of one shape to both orders of [`Self::blocks`]. Rows and columns beyond the last are zeros.
    pub fn quantise_blocks<W: Borrow<Memory<f32>>>(
        &self,
        weights: impl ExactSizeIterator<Item = Result<W, BackendError>>,
        [rows, columns]: [usize; 2],
        both: &mut [Blocks; 2],
    ) -> Result<(), BackendError> {
        let whole =
            |rows: usize, columns: usize| (weights.len(), rows.next_multiple_of(8), columns.next_multiple_of(TILE));
        let shapes = both.each_ref().map(|of| (of.groups, of.rows, of.columns));
        assert_eq!(shapes, [whole(rows, columns), whole(columns, rows)], "blocks of weights");
        let tiles = rows.div_ceil(TILE) * columns.div_ceil(TILE);
        let (r, c) = (rows as i32, columns as i32);
        for (at, w) in weights.enumerate() {
            let (w, shape) = (w?, (tiles, 512, 0));
            let (w, [of, turned]) = (w.borrow(), both.each_ref().map(|all| all.one(at).addresses(self)));
            assert_eq!(w.len(), rows * columns, "elements of a weight");
            run!(self, BLOCKS, "quantise_blocks", shape, w, &of[0], &of[1], &turned[0], &turned[1], &r, &c)?;
        }
        Ok(())
    }

    /// RMSNorm of `x_RC` with weights `w_C` to BF16 and to E4M3, and the factor of each row.
    pub fn rms_norm_quantised(
        &self,
        x: &impl DevicePtr<u16>,
        w: &impl DevicePtr<f32>,
        (y, out, roots): (&mut Memory<u16>, &mut Codes, &mut Memory<f32>),
        eps: f32,
    ) -> Result<(), BackendError> {
        let (rows, columns) = (out.rows, out.columns);
        let lengths = (x.len(), w.len(), y.len(), roots.len());
        assert_eq!(lengths, (rows * columns, columns, rows * columns, rows), "elements of a norm");
        let ([r, c, stride], power) = (out.sizes(), 0);
        let (x, w) = (x.device_ptr(&self.stream).0, w.device_ptr(&self.stream).0);
        let shared = 4 * (2 * columns + 32);
        run!(
            self,
            NORM,
            "rms_norm",
            (rows.div_ceil(4), 512, shared),
            &x,
            &w,
            y,
            &mut out.codes,
            &mut out.scales,
            roots,
            &r,
            &c,
            &stride,
            &power,
            &eps
        )
    }

    /// Gradient of an RMSNorm of `x_RC` with weights `w_C`: `dy_RC -> dx_RC`.
    pub fn rms_norm_backward(
        &self,
        [x, dy]: [&impl DevicePtr<u16>; 2],
        w: &impl DevicePtr<f32>,
        dx: &mut Memory<u16>,
        eps: f32,
    ) -> Result<(), BackendError> {
        let columns = w.len();
        assert!(columns.is_multiple_of(TILE) && columns > 0, "{columns} columns in tiles of {TILE}");
        let rows = x.len() / columns;
        assert_eq!([x.len(), dy.len(), dx.len()], [rows * columns; 3], "elements of a norm's gradient");
        let (r, c) = (rows as i32, columns as i32);
        let ([x, dy], w) = ([x, dy].map(|of| of.device_ptr(&self.stream).0), w.device_ptr(&self.stream).0);
        let threads = (columns / 16).next_power_of_two().clamp(64, 256);
        let (threads, shared) = (threads as u32, 4 * (2 * columns + 32) + 2 * (32 * threads + 64));
        let resident = self.resident(&self.function(&NORM, "rms_norm_backward", shared as u32)?, threads, shared)?;
        let shape = (rows.div_ceil(2), threads, shared);
        run!(self, NORM, "rms_norm_backward", shape, &x, &w, &dy, dx, &r, &c, &eps, &resident)
    }

    /// Strips in which the gradient of a norm's weights adds so many rows, at least one. It depends on their number alone, so that
    /// every card adds in the same order.
    pub fn strips(rows: usize) -> usize {
        rows.div_ceil(STRIP).max(1)
    }

    /// Gradient of the weights of an RMSNorm: `x_RC, dy_RC, roots_R -> dw_C`, with the factors that [`Self::rms_norm_quantised`]
    /// gave. `sums` is room for a row of each of [`Self::strips`].
    pub fn rms_norm_weight_gradient(
        &self,
        x: &Memory<u16>,
        dy: &Memory<u16>,
        roots: &Memory<f32>,
        sums: &mut Memory<f32>,
        dw: &mut Memory<f32>,
    ) -> Result<(), BackendError> {
        let (rows, columns) = (roots.len(), dw.len());
        assert!(columns.is_multiple_of(TILE) && columns > 0, "{columns} columns in tiles of {TILE}");
        let (n, strips) = (rows * columns, Self::strips(rows));
        assert_eq!((x.len(), dy.len(), sums.len()), (n, n, strips * columns), "elements of a norm and its strips");
        let (shape, r, c) = ((strips * columns.div_ceil(256), 256, 0), rows as i32, columns as i32);
        run!(self, NORM, "rms_norm_weight", shape, x, dy, roots, &mut *sums, &r, &c)?;
        let (from, to, count) = (sums.device_ptr(&self.stream).0, dw.device_ptr(&self.stream).0, strips as i32);
        let function = self.function(&NORM, "rms_norm_weight_sum", 0)?;
        let arguments = [pointer(&from), pointer(&to), pointer(&count), pointer(&c)];
        // SAFETY: the arguments are the kernel's, as long as was asserted; it waits for the strips before it reads them.
        unsafe { self.launch_early(&function, launch_of(columns as u32 / 32, 256, 0), arguments) }
    }

    /// SwiGLU of `gate_RC` and `up_RC` to BF16 and to E4M3.
    pub fn swiglu_quantised(
        &self,
        gate: &impl DevicePtr<u16>,
        up: &impl DevicePtr<u16>,
        h: &mut Memory<u16>,
        out: &mut Codes,
    ) -> Result<(), BackendError> {
        assert_eq!([gate.len(), up.len(), h.len()], [out.rows * out.columns; 3], "elements of a SwiGLU");
        let (rows, columns) = (out.rows, out.columns);
        let ([r, c, stride], power) = (out.sizes(), 0);
        let (gate, up) = (gate.device_ptr(&self.stream).0, up.device_ptr(&self.stream).0);
        run!(
            self,
            SWIGLU,
            "swiglu",
            (by_tiles(rows, columns, 4), 256, 0),
            &gate,
            &up,
            h,
            &mut out.codes,
            &mut out.scales,
            &r,
            &c,
            &stride,
            &power
        )
    }

    /// Gradients of [`Self::swiglu_quantised`] to BF16 and to E4M3: of `gate_RC`, and of `up_RC`.
    pub fn swiglu_backward_quantised(
        &self,
        [gate, up, dh]: [&impl DevicePtr<u16>; 3],
        [dgate, dup]: [&mut Memory<u16>; 2],
        [of_gate, of_up]: [&mut Codes; 2],
    ) -> Result<(), BackendError> {
        let (rows, columns) = (of_gate.rows, of_gate.columns);
        assert_eq!([of_up.rows, of_up.columns], [rows, columns], "codes of two gradients");
        let lengths = [gate.len(), up.len(), dh.len(), dgate.len(), dup.len()];
        assert_eq!(lengths, [rows * columns; 5], "elements of a SwiGLU's gradients");
        let ([r, c, stride], power) = (of_gate.sizes(), 0);
        let [gate, up, dh] = [gate, up, dh].map(|x| x.device_ptr(&self.stream).0);
        run!(
            self,
            SWIGLU,
            "swiglu_backward",
            (by_tiles(rows, columns, 4), 256, 0),
            &gate,
            &up,
            &dh,
            dgate,
            dup,
            &mut of_gate.codes,
            &mut of_gate.scales,
            &mut of_up.codes,
            &mut of_up.scales,
            &r,
            &c,
            &stride,
            &power
        )
    }

    /// Rows of experts to rows of tokens: `weights` of their choices, or ones, groups of experts rounded and added in order.
    pub fn combine_rows(
        &self,
        rows: &impl DevicePtr<u16>,
        places: &Places,
        weights: Option<CudaView<'_, f32>>,
        y: &mut Memory<u16>,
        columns: usize,
    ) -> Result<(), BackendError> {
        let (tokens, top_k) = (places.tokens, places.top_k);
        assert!(columns.is_multiple_of(TILE), "{columns} columns in tiles of {TILE}");
        let choices = weights.as_ref().map_or(tokens * top_k, DeviceSlice::len);
        let lengths = (rows.len(), y.len(), choices);
        assert_eq!(lengths, (places.rows * columns, tokens * columns, tokens * top_k), "elements of a combine");
        let blocks = (tokens * columns.div_ceil(256)).div_ceil(WARPS);
        let (rows, weights) =
            (rows.device_ptr(&self.stream).0, weights.as_ref().map_or(0, |w| w.device_ptr(&self.stream).0));
        let (t, k, c, size) = (tokens as i32, top_k as i32, columns as i32, places.group_size as i32);
        run!(
            self,
            PERMUTE,
            "combine",
            (blocks, 256, 0),
            &rows,
            &places.place,
            &weights,
            &places.experts,
            y,
            &t,
            &k,
            &c,
            &size
        )
    }

    /// Gradients of [`Self::combine_rows`]: of the experts' rows, where a place names them, and of the weights, 0 where the
    /// choice is not here.
    pub fn combine_rows_backward(
        &self,
        dy: &impl DevicePtr<u16>,
        rows: &impl DevicePtr<u16>,
        places: &Places,
        weights: &impl DevicePtr<f32>,
        (drows, dweights): (&mut Memory<u16>, &mut Memory<f32>),
        columns: usize,
    ) -> Result<(), BackendError> {
        let (tokens, top_k) = (places.tokens, places.top_k);
        assert!(columns.is_multiple_of(TILE), "{columns} columns in tiles of {TILE}");
        assert_eq!([rows.len(), drows.len()], [places.rows * columns; 2], "elements of the experts' rows");
        let lengths = (dy.len(), weights.len(), dweights.len());
        assert_eq!(lengths, (tokens * columns, tokens * top_k, tokens * top_k), "elements of a combine's gradients");
        let blocks = (tokens * top_k.div_ceil(8)).div_ceil(WARPS);
        let ([dy, rows], weights) =
            ([dy.device_ptr(&self.stream).0, rows.device_ptr(&self.stream).0], weights.device_ptr(&self.stream).0);
        // Two stages of each warp, of nine rows of 256 columns, 32 bytes apart.
        let shared = WARPS * 2 * 9 * (2 * 256 + 32);
        let (t, k, c) = (tokens as i32, top_k as i32, columns as i32);
        run!(
            self,
            PERMUTE,
            "combine_backward",
            (blocks, 256, shared),
            &dy,
            &rows,
            &places.place,
            &weights,
            drows,
            dweights,
            &t,
            &k,
            &c
        )
    }

    /// `x_TC` to the rows of the experts of its tokens, in E4M3 with scales `[rows][C/128]`.
    pub fn dispatch_quantised(
        &self,
        x: &Memory<u16>,
        places: &Places,
        (codes, scales): (&mut Memory<u8>, &mut Memory<f32>),
        columns: usize,
        power: bool,
    ) -> Result<(), BackendError> {
        let tokens = places.tokens;
        assert!(columns.is_multiple_of(TILE), "{columns} columns in tiles of {TILE}");
        let lengths = (x.len(), codes.len(), scales.len() * TILE);
        let rows = places.rows * columns;
        assert_eq!(lengths, (tokens * columns, rows, rows), "elements of a dispatch");
        let blocks = (tokens * (columns / TILE).div_ceil(8)).div_ceil(WARPS);
        let (t, k, c, power) = (tokens as i32, places.top_k as i32, columns as i32, i32::from(power));
        run!(self, PERMUTE, "dispatch", (blocks, 256, 0), x, &places.place, codes, scales, &t, &k, &c, &power)
    }

    /// `x_TC` by groups of tokens to `[C][T]` in E4M3, each group filled up to whole blocks of 128 with zeros.
    pub fn turn(
        &self,
        x: &impl DevicePtr<u16>,
        groups: &Groups,
        out: &mut Codes,
        power: bool,
    ) -> Result<(), BackendError> {
        let ((count, columns, width), power) = (turned(groups, x.len(), out), i32::from(power));
        let x = x.device_ptr(&self.stream).0;
        let blocks = out.columns / TILE * (out.rows / 64);
        run!(
            self,
            TURN,
            "turn_bf16",
            (blocks, 256, 0),
            &x,
            &groups.offsets,
            &groups.blocks,
            &count,
            &mut out.codes,
            &mut out.scales,
            &columns,
            &width,
            &power
        )
    }

    /// The same of rows that are in E4M3 already: an activation is kept so from its forward product.
    pub fn turn_codes(&self, x: &Codes, groups: &Groups, out: &mut Codes, power: bool) -> Result<(), BackendError> {
        assert_eq!(x.columns, out.rows, "columns become rows");
        let ((count, columns, width), power) = (turned(groups, x.rows * x.columns, out), i32::from(power));
        let [_, _, from] = x.sizes();
        let blocks = out.columns / TILE * (out.rows / TILE);
        run!(
            self,
            TURN,
            "turn_e4m3",
            (blocks, 256, 0),
            &x.codes,
            &x.scales,
            &groups.offsets,
            &groups.blocks,
            &count,
            &mut out.codes,
            &mut out.scales,
            &columns,
            &from,
            &width,
            &power
        )
    }
}

/// Groups, columns that become rows, and the width of those, as a kernel takes them.
fn turned(groups: &Groups, elements: usize, out: &Codes) -> (i32, i32, i32) {
    let whole = out.rows.is_multiple_of(TILE) && out.columns == groups.filled();
    assert!(whole, "a turn of {} columns to {} tokens, not {}", out.rows, groups.filled(), out.columns);
    assert_eq!(elements, groups.rows * out.rows, "elements of the groups' rows");
    (groups.count as i32, out.rows as i32, out.columns as i32)
}
