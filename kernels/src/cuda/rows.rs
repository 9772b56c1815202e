//! What is done to rows at the speed of memory: quantise, norms, SwiGLU, dispatch, combine, and the turn of tokens into
//! columns. Layouts and roundings are told in the files of `hopper/`.

use super::device::{Gpu, run};
use super::memory::Memory;
use super::products::{Codes, Groups, TILE};
use super::sources::{NORM, PERMUTE, QUANTISE, SWIGLU, TURN};
use crate::backend::BackendError;

/// Warps of a block, except in norms.
const WARPS: usize = 8;

/// Blocks for warps that take `rows` rows of a tile each.
fn by_tiles(rows: usize, columns: usize, each: usize) -> usize {
    (rows.div_ceil(each) * (columns / TILE)).div_ceil(WARPS)
}

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
        assert!((1..=32).contains(&top_k) && group_size > 0, "{top_k} choices among groups of {group_size}");
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
    /// Memory for codes and scales.
    pub fn codes(&self, rows: usize, columns: usize) -> Result<Codes, BackendError> {
        let (codes, scales) = (self.zeros(rows * columns)?, self.zeros(Codes::scale_count(rows, columns))?);
        Ok(Codes::new(rows, columns, codes, scales))
    }

    /// `x_RC` to E4M3; scales are powers of two if `power`.
    pub fn quantise_rows(&self, x: &Memory<u16>, out: &mut Codes, power: bool) -> Result<(), BackendError> {
        assert_eq!(x.len(), out.rows * out.columns, "elements of a matrix");
        let (rows, columns) = (out.rows, out.columns);
        let ([r, c, stride], power) = (out.sizes(), i32::from(power));
        run!(
            self,
            QUANTISE,
            "quantise_rows",
            (by_tiles(rows, columns, 8), 256, 0),
            x,
            &mut out.codes,
            &mut out.scales,
            &r,
            &c,
            &stride,
            &power
        )
    }

    /// RMSNorm of `x_RC` with weights `w_C` to BF16 and to E4M3.
    pub fn rms_norm_quantised(
        &self,
        x: &Memory<u16>,
        w: &Memory<f32>,
        y: &mut Memory<u16>,
        out: &mut Codes,
        eps: f32,
    ) -> Result<(), BackendError> {
        assert_eq!((x.len(), w.len(), y.len()), (out.rows * out.columns, out.columns, x.len()), "elements of a norm");
        let (rows, columns) = (out.rows, out.columns);
        let ([r, c, stride], power) = (out.sizes(), 0);
        let shared = 4 * (2 * columns + 32);
        run!(
            self,
            NORM,
            "rms_norm",
            (rows.div_ceil(4), 512, shared),
            x,
            w,
            y,
            &mut out.codes,
            &mut out.scales,
            &r,
            &c,
            &stride,
            &power,
            &eps
        )
    }

    /// How the gradient of a norm's weights splits so many rows: strips, at least one, and the rows of each but the last. It
    /// depends on their number alone, so that every card adds in the same order. 256 strips keep two of them on each
    /// multiprocessor, while what is written between is small.
    pub fn strips(rows: usize) -> (usize, usize) {
        let each = rows.div_ceil(256).next_multiple_of(2).max(8);
        (rows.div_ceil(each).max(1), each)
    }

    /// Gradient of the weights of an RMSNorm: `x_RC, dy_RC -> dw_C`. `sums` is room for a row of each of [`Self::strips`].
    pub fn rms_norm_weight_gradient(
        &self,
        x: &Memory<u16>,
        dy: &Memory<u16>,
        sums: &mut Memory<f32>,
        dw: &mut Memory<f32>,
        eps: f32,
    ) -> Result<(), BackendError> {
        let columns = dw.len();
        let fits = columns.is_multiple_of(TILE) && (TILE..=8192).contains(&columns);
        assert!(fits, "{columns} columns in tiles of {TILE}, at most 8192");
        let rows = x.len() / columns;
        let (strips, each) = Self::strips(rows);
        let lengths = (x.len(), dy.len(), sums.len());
        assert_eq!(lengths, (rows * columns, rows * columns, strips * columns), "elements of a norm and its strips");
        self.sum_strips(x, dy, sums, [rows, columns, strips, each], eps)?;
        let (count, c) = (strips as i32, columns as i32);
        run!(self, NORM, "rms_norm_weight_sum", (columns / 32, 256, 0), &*sums, dw, &count, &c)
    }

    /// The sum of each strip, of which the caller has asserted the lengths.
    fn sum_strips(
        &self,
        x: &Memory<u16>,
        dy: &Memory<u16>,
        sums: &mut Memory<f32>,
        [rows, columns, strips, each]: [usize; 4],
        eps: f32,
    ) -> Result<(), BackendError> {
        // As many stages as two blocks of a multiprocessor have room for, which each need some 1.5 kB besides.
        let stage = 2 * (2 * columns + 32);
        let depth = [4i32, 3].into_iter().find(|depth| stage << depth <= 115_200).unwrap_or(2);
        let (r, c, each) = (rows as i32, columns as i32, each as i32);
        run!(self, NORM, "rms_norm_weight", (strips, 352, stage << depth), x, dy, sums, &r, &c, &each, &depth, &eps)
    }

    /// SwiGLU of `gate_RC` and `up_RC` to BF16 and to E4M3.
    pub fn swiglu_quantised(
        &self,
        gate: &Memory<u16>,
        up: &Memory<u16>,
        h: &mut Memory<u16>,
        out: &mut Codes,
    ) -> Result<(), BackendError> {
        assert_eq!([gate.len(), up.len(), h.len()], [out.rows * out.columns; 3], "elements of a SwiGLU");
        let (rows, columns) = (out.rows, out.columns);
        let ([r, c, stride], power) = (out.sizes(), 0);
        run!(
            self,
            SWIGLU,
            "swiglu",
            (by_tiles(rows, columns, 4), 256, 0),
            gate,
            up,
            h,
            &mut out.codes,
            &mut out.scales,
            &r,
            &c,
            &stride,
            &power
        )
    }

    /// Rows of experts to rows of tokens: `weights` of their choices, groups of experts rounded and added in order.
    pub fn combine_rows(
        &self,
        rows: &Memory<u16>,
        places: &Places,
        weights: &Memory<f32>,
        y: &mut Memory<u16>,
        columns: usize,
    ) -> Result<(), BackendError> {
        let (tokens, top_k) = (places.tokens, places.top_k);
        assert!(columns.is_multiple_of(TILE), "{columns} columns in tiles of {TILE}");
        let lengths = (rows.len(), y.len(), weights.len());
        assert_eq!(lengths, (places.rows * columns, tokens * columns, tokens * top_k), "elements of a combine");
        let blocks = (tokens * columns.div_ceil(256)).div_ceil(WARPS);
        let (t, k, c, size) = (tokens as i32, top_k as i32, columns as i32, places.group_size as i32);
        run!(
            self,
            PERMUTE,
            "combine",
            (blocks, 256, 0),
            rows,
            &places.place,
            weights,
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
        dy: &Memory<u16>,
        rows: &Memory<u16>,
        places: &Places,
        weights: &Memory<f32>,
        (drows, dweights): (&mut Memory<u16>, &mut Memory<f32>),
        columns: usize,
    ) -> Result<(), BackendError> {
        let (tokens, top_k) = (places.tokens, places.top_k);
        assert!(columns.is_multiple_of(TILE), "{columns} columns in tiles of {TILE}");
        assert_eq!([rows.len(), drows.len()], [places.rows * columns; 2], "elements of the experts' rows");
        let lengths = (dy.len(), weights.len(), dweights.len());
        assert_eq!(lengths, (tokens * columns, tokens * top_k, tokens * top_k), "elements of a combine's gradients");
        let blocks = (tokens * top_k.div_ceil(8)).div_ceil(WARPS);
        // Two stages of each warp, of nine rows of 256 columns, 32 bytes apart.
        let shared = WARPS * 2 * 9 * (2 * 256 + 32);
        let (t, k, c) = (tokens as i32, top_k as i32, columns as i32);
        run!(
            self,
            PERMUTE,
            "combine_backward",
            (blocks, 256, shared),
            dy,
            rows,
            &places.place,
            weights,
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
    pub fn turn(&self, x: &Memory<u16>, groups: &Groups, out: &mut Codes, power: bool) -> Result<(), BackendError> {
        let ((count, columns, width), power) = (turned(groups, x.len(), out), i32::from(power));
        let blocks = out.columns / TILE * (out.rows / 64);
        run!(
            self,
            TURN,
            "turn_bf16",
            (blocks, 256, 0),
            x,
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
