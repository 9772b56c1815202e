//! FP8 products on the tensor cores: dense, grouped by expert, and the weight gradient. Layouts and orders of sums are
//! told in `hopper/fp8_gemm.cu` and `hopper/fp8_wgrad.cu`.

use super::device::{Boxes, Gpu, Kind, TensorMap, launch_of};
use super::failure::told;
use super::memory::Memory;
use super::sources::{DENSE_128X176, DENSE_256X128, DENSE_256X128_SHORT, GROUPED, Source, WGRAD};
use crate::backend::BackendError;
use cudarc::driver::{CudaView, DevicePtr, DevicePtrMut, PushKernelArg};
use std::sync::Arc;

/// Elements under one scale, along a row.
pub(super) const TILE: usize = 128;

/// `x_RC` in E4M3 on the device, with a scale for each 128 of its columns, stored `[C/128][R]` with rows padded to a
/// multiple of four.
#[derive(Debug)]
pub struct Codes {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) codes: Memory<u8>,
    pub(super) scales: Memory<f32>,
}

impl Codes {
    /// Of codes row by row, and scales by tile. Panics if there are not as many as the shape says.
    pub fn new(rows: usize, columns: usize, codes: Memory<u8>, scales: Memory<f32>) -> Self {
        assert!(columns.is_multiple_of(TILE), "{columns} columns in tiles of {TILE}");
        let lengths = (codes.len(), scales.len());
        assert_eq!(lengths, (rows * columns, Self::scale_count(rows, columns)), "a {rows} x {columns} matrix");
        Self { rows, columns, codes, scales }
    }

    /// Codes, row by row.
    pub fn codes(&self) -> &Memory<u8> {
        &self.codes
    }

    /// Scales, by tile, then by row.
    pub fn scales(&self) -> &Memory<f32> {
        &self.scales
    }

    /// Rows, columns and the distance of two tiles' scales, as kernels take them.
    pub(super) fn sizes(&self) -> [i32; 3] {
        [self.rows, self.columns, Self::stride(self.rows)].map(|n| n as i32)
    }

    fn address(&self) -> u64 {
        self.codes.device_ptr(self.codes.stream()).0
    }

    /// Distance of two tiles' scales.
    pub fn stride(rows: usize) -> usize {
        rows.next_multiple_of(4)
    }

    /// Scales of a matrix.
    pub fn scale_count(rows: usize, columns: usize) -> usize {
        Self::stride(rows) * columns / TILE
    }
}

/// `w_GOI` in E4M3 on the device, with a scale for each block of 128 x 128, stored `[G][O/128][I/128]`.
#[derive(Debug, Clone)]
pub struct Blocks {
    pub(super) groups: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    codes: Arc<Memory<u8>>,
    scales: Arc<Memory<f32>>,
    /// The first matrix of those in memory.
    first: usize,
}

impl Blocks {
    /// `groups` matrices of rows that are a multiple of 8 and columns that are one of 128, by codes row by row and scales
    /// by group, row and column of blocks. Panics if there are not as many as that.
    pub fn new(groups: usize, rows: usize, columns: usize, codes: Memory<u8>, scales: Memory<f32>) -> Self {
        assert!(rows.is_multiple_of(8) && columns.is_multiple_of(TILE), "weights of {rows} x {columns}");
        let all = Self { groups, rows, columns, codes: Arc::new(codes), scales: Arc::new(scales), first: 0 };
        let expected = (groups * rows * columns, groups * all.scales_each());
        assert_eq!((all.codes.len(), all.scales.len()), expected, "{groups} weights of {rows} x {columns}");
        all
    }

    /// Scales of a matrix.
    fn scales_each(&self) -> usize {
        self.rows.div_ceil(TILE) * (self.columns / TILE)
    }

    /// Codes and scales of all.
    pub fn views(&self) -> (CudaView<'_, u8>, CudaView<'_, f32>) {
        let ends = (self.first, self.first + self.groups);
        let at = |each: usize| ends.0 * each..ends.1 * each;
        (self.codes.slice(at(self.rows * self.columns)), self.scales.slice(at(self.scales_each())))
    }

    /// Where they lie: codes, and scales.
    pub(super) fn addresses(&self, gpu: &Gpu) -> [u64; 2] {
        let (codes, scales) = self.views();
        [codes.device_ptr(&gpu.stream).0, scales.device_ptr(&gpu.stream).0]
    }

    pub(super) fn ordinal(&self) -> usize {
        self.codes.ordinal()
    }

    /// One of them, in the same memory.
    pub(super) fn one(&self, group: usize) -> Self {
        assert!(group < self.groups, "weight {group} of {}", self.groups);
        Self { groups: 1, first: self.first + group, ..self.clone() }
    }

    /// Those of all, one after another: the same memory if they lie so already. There is one at least, and all have one shape.
    pub(super) fn stacked(gpu: &Gpu, all: &[&Self]) -> Result<Self, BackendError> {
        let (first, groups) = (all[0], all.iter().map(|w| w.groups).sum());
        assert!(all.iter().all(|w| [w.rows, w.columns] == [first.rows, first.columns]), "weights of one shape");
        let mut end = first.first;
        let follows = all.iter().all(|w| {
            let next = Arc::ptr_eq(&w.codes, &first.codes) && w.first == end;
            end += w.groups;
            next
        });
        if follows {
            return Ok(Self { groups, ..first.clone() });
        }
        let codes = gpu.joined(&all.iter().map(|w| w.views().0).collect::<Vec<_>>())?;
        let scales = gpu.joined(&all.iter().map(|w| w.views().1).collect::<Vec<_>>())?;
        Ok(Self::new(groups, first.rows, first.columns, codes, scales))
    }
}

/// Consecutive groups of tokens, and the blocks of 128 that each fills once its tokens are columns.
#[derive(Debug)]
pub struct Groups {
    pub(super) count: usize,
    /// Tokens of all.
    pub(super) rows: usize,
    /// Blocks of all.
    pub(super) filled: usize,
    /// First rows, and the end.
    pub(super) offsets: Memory<i32>,
    /// First blocks, and the end.
    pub(super) blocks: Memory<i32>,
}

impl Groups {
    /// Of so many tokens each.
    pub fn new(gpu: &Gpu, counts: &[u32]) -> Result<Self, BackendError> {
        let ends = |each: &dyn Fn(u32) -> u32| -> Vec<i32> {
            let mut ends = vec![0];
            counts.iter().for_each(|n| ends.push(ends[ends.len() - 1] + each(*n) as i32));
            ends
        };
        let (offsets, blocks) = (ends(&|n| n), ends(&|n| n.div_ceil(TILE as u32)));
        let (rows, filled) = (offsets[counts.len()] as usize, blocks[counts.len()] as usize);
        let (offsets, blocks) = (gpu.upload(&offsets)?, gpu.upload(&blocks)?);
        Ok(Self { count: counts.len(), rows, filled, offsets, blocks })
    }

    /// Tokens of all groups once each fills whole blocks.
    pub fn filled(&self) -> usize {
        self.filled * TILE
    }
}

/// The rows and columns of a tile and what else a launch needs to know of a variant.
#[derive(Clone, Copy)]
struct Tile {
    math: usize,
    rows: usize,
    columns: usize,
    stages: usize,
    grouped: bool,
}

impl Tile {
    fn of(source: &Source) -> Self {
        let value = |name| source.value(name) as usize;
        Self {
            math: value("MATH"),
            rows: value("BM"),
            columns: value("BN"),
            stages: value("STAGES"),
            grouped: value("GROUPED") == 1,
        }
    }

    /// Columns of a store.
    fn store(&self) -> usize {
        if self.columns.is_multiple_of(64) { 64 } else { self.columns }
    }

    /// Bytes of shared memory, as `fp8_gemm.cu` lays them out.
    fn shared(&self) -> usize {
        let scales = if self.grouped { self.rows.div_ceil(TILE) * 512 + 128 } else { self.rows * 4 };
        self.stages * ((self.rows + self.columns) * TILE + scales + 16) + self.rows * self.columns * 2 + 16 * self.math
    }
}

/// The variant that takes least: waves of tiles, by what a tile of that kind costs. Measured on an H100
/// (docs/measurements/hopper-fp8.md); bits do not depend on it.
fn choose(m: usize, n: usize, k: usize, processors: usize) -> &'static Source {
    let cost = |(source, weight): (&'static Source, f64)| {
        let tile = Tile::of(source);
        let waves = (m.div_ceil(tile.rows) * n.div_ceil(tile.columns)).div_ceil(processors);
        (source, (waves * tile.rows * tile.columns) as f64 * weight)
    };
    let tall = if k < 4096 { &DENSE_256X128_SHORT } else { &DENSE_256X128 };
    let [tall, wide] = [(tall, 1.0), (&DENSE_128X176, 1.06)].map(cost);
    if wide.1 < tall.1 { wide.0 } else { tall.0 }
}

impl Gpu {
    /// `x_TI, w_OI -> y_TO` in BF16: block-scaled operands, FP32 sums that are promoted every 128 of I.
    pub fn fp8_linear(&self, x: &Codes, w: &Blocks, y: &mut Memory<u16>) -> Result<(), BackendError> {
        assert_eq!((w.groups, w.columns, y.len()), (1, x.columns, x.rows * w.rows), "shapes of a product");
        let source = choose(x.rows, w.rows, x.columns, self.processors as usize);
        self.fp8_product(source, x, w, None, y)
    }

    /// The same with each group of rows of `x` against its own matrix.
    pub fn fp8_grouped(&self, x: &Codes, w: &Blocks, groups: &Groups, y: &mut Memory<u16>) -> Result<(), BackendError> {
        let shapes = (w.columns, y.len(), w.groups, x.rows);
        assert_eq!(shapes, (x.columns, x.rows * w.rows, groups.count, groups.rows), "shapes of a grouped product");
        self.fp8_product(&GROUPED, x, w, Some(&groups.offsets), y)
    }

    fn fp8_product(
        &self,
        source: &'static Source,
        x: &Codes,
        w: &Blocks,
        offsets: Option<&Memory<i32>>,
        y: &mut Memory<u16>,
    ) -> Result<(), BackendError> {
        let (m, n, k, tile) = (x.rows, w.rows, x.columns, Tile::of(source));
        if m == 0 {
            return Ok(());
        }
        let [codes_w, scales_w] = w.addresses(self);
        let map_x = self.bytes(x.address(), m, k, tile.rows)?;
        let map_w = self.bytes(codes_w, n * w.groups, k, tile.columns)?;
        let map_s = self.scales(x, if tile.grouped { 132 } else { tile.rows })?;
        let function = self.function(source, "fp8_gemm", tile.shared() as u32)?;
        let map_y = {
            let (address, _held) = y.device_ptr_mut(&self.stream);
            let swizzled = tile.columns.is_multiple_of(64);
            let (dimensions, strides, size) = ([n, m], [2 * n], [tile.store(), 32]);
            let boxes = Boxes { kind: Kind::Bf16, dimensions: &dimensions, strides: &strides, size: &size, swizzled };
            self.tensor_map(address, &boxes)?
        };
        let (groups, m, n, k) = (w.groups as i32, m as i32, n as i32, k as i32);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&map_x).arg(&map_w).arg(&map_y).arg(&map_s).arg(y).arg(&scales_w);
        match offsets {
            Some(offsets) => launch.arg(offsets),
            // A dense product reads none.
            None => launch.arg(&scales_w),
        };
        launch.arg(&groups).arg(&m).arg(&n).arg(&k);
        let config = launch_of(self.processors, 128 * (tile.math as u32 + 1), tile.shared() as u32);
        // SAFETY: the operands are as long as their shapes say, which their constructors assert; groups end with the rows;
        // `y` and the shapes among each other are asserted by the callers.
        unsafe { launch.launch(config) }.map_err(|e| self.error(format!("{}: {}", source.name, told(e))))?;
        Ok(())
    }

    /// `dw_GOI += dy^T x`, for each group of tokens: `dy` and `x` are transposed, `[O][T]` and `[I][T]`, each group's
    /// tokens filling whole blocks of 128.
    pub fn fp8_weight_gradient(
        &self,
        dy: &Codes,
        x: &Codes,
        groups: &Groups,
        dw: &mut Memory<f32>,
    ) -> Result<(), BackendError> {
        let (m, n, tokens, offsets, count) = (dy.rows, x.rows, groups.filled(), &groups.blocks, groups.count);
        assert_eq!([dy.columns, x.columns], [tokens; 2], "tokens of a weight gradient");
        assert_eq!(dw.len(), count * m * n, "elements of a weight gradient");
        assert!(n.is_multiple_of(4), "a weight gradient of {n} columns");
        if tokens == 0 {
            return Ok(());
        }
        let value = |name| WGRAD.value(name) as usize;
        let (math, columns, stages) = (value("MATH"), value("BN"), value("STAGES"));
        let rows = 64 * math;
        let shared = stages * ((rows + columns) * (TILE + 4) + 16) + rows * columns * 4 + 48;
        let map_a = self.bytes(dy.address(), m, tokens, rows)?;
        let map_b = self.bytes(x.address(), n, tokens, columns)?;
        let (map_sa, map_sb) = (self.scales(dy, rows)?, self.scales(x, columns)?);
        let function = self.function(&WGRAD, "fp8_wgrad", shared as u32)?;
        let map_d = {
            let (address, _held) = dw.device_ptr_mut(&self.stream);
            let (dimensions, strides, size) = ([n, m, count], [4 * n, 4 * n * m], [32, 64, 1]);
            let kind = Kind::F32;
            let boxes = Boxes { kind, dimensions: &dimensions, strides: &strides, size: &size, swizzled: true };
            self.tensor_map(address, &boxes)?
        };
        let (groups, m, n) = (count as i32, m as i32, n as i32);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&map_a).arg(&map_b).arg(&map_d).arg(&map_sa).arg(&map_sb);
        launch.arg(offsets).arg(&groups).arg(&m).arg(&n);
        let config = launch_of(self.processors, 128 * (math as u32 + 1), shared as u32);
        // SAFETY: as for the products; the kernel writes `dw` through its descriptor alone, on this stream.
        unsafe { launch.launch(config) }.map_err(|e| self.error(format!("{}: {}", WGRAD.name, told(e))))?;
        Ok(())
    }

    /// Boxes of `rows` x 128 codes of a matrix.
    fn bytes(&self, address: u64, height: usize, width: usize, rows: usize) -> Result<TensorMap, BackendError> {
        let (dimensions, strides, size) = ([width, height], [width], [TILE, rows]);
        let kind = Kind::Byte;
        self.tensor_map(
            address,
            &Boxes { kind, dimensions: &dimensions, strides: &strides, size: &size, swizzled: true },
        )
    }

    /// Boxes of `count` scales of a tile.
    fn scales(&self, of: &Codes, count: usize) -> Result<TensorMap, BackendError> {
        let (address, _held) = of.scales.device_ptr(&self.stream);
        let (dimensions, strides, size) = ([of.rows, of.columns / TILE], [4 * Codes::stride(of.rows)], [count, 1]);
        let kind = Kind::F32;
        self.tensor_map(
            address,
            &Boxes { kind, dimensions: &dimensions, strides: &strides, size: &size, swizzled: false },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_chosen_by_waves_and_by_the_length_of_sums() {
        let chosen = |m, n, k| choose(m, n, k, 132).name;
        for ([m, n, k], name) in [
            ([4096, 2112, 7168], "fp8_gemm 128x176"),
            ([4096, 24576, 1536], "fp8_gemm 256x128 short"),
            ([4096, 32768, 512], "fp8_gemm 256x128 short"),
            ([4096, 7168, 16384], "fp8_gemm 256x128"),
            ([4096, 4096, 7168], "fp8_gemm 256x128"),
            ([4096, 7168, 2048], "fp8_gemm 256x128 short"),
            ([8192, 8192, 8192], "fp8_gemm 256x128"),
        ] {
            assert_eq!(chosen(m, n, k), name, "{m} x {n} x {k}");
        }
    }

    #[test]
    fn every_tile_fits_into_shared_memory() {
        for source in [DENSE_256X128, DENSE_256X128_SHORT, DENSE_128X176, GROUPED] {
            let bytes = Tile::of(&source).shared();
            assert!(bytes <= 232_448, "{}: {bytes} bytes", source.name);
        }
    }
}
