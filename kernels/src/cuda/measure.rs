//! What benches need beside the kernels: data on the GPU, times by its own clock, and what memory reaches.

use super::device::{Gpu, launch_of};
use super::failure::told;
use super::memory::Memory;
use super::sources::READ;
use crate::backend::BackendError;
use cudarc::driver::{DevicePtr, DeviceRepr, PushKernelArg, sys as driver};

/// Bytes that push everything else out of the second-level cache (50 MB).
const FLUSH: usize = 256 << 20;

impl Gpu {
    /// A copy of host memory.
    pub fn upload<T: DeviceRepr>(&self, data: &[T]) -> Result<Memory<T>, BackendError> {
        let mut memory = self.room(data.len())?;
        if !data.is_empty() {
            self.stream.memcpy_htod(data, &mut memory).map_err(|e| self.error(told(e)))?;
        }
        Ok(memory)
    }

    /// A copy in host memory, when all before is done.
    pub fn download<T: DeviceRepr>(&self, data: &impl DevicePtr<T>) -> Result<Vec<T>, BackendError> {
        self.stream.clone_dtoh(data).map_err(|e| self.error(told(e)))
    }

    /// Median seconds of `f` by the GPU's clock. The cache is emptied before each run.
    pub fn seconds(
        &self,
        repetitions: usize,
        mut f: impl FnMut() -> Result<(), BackendError>,
    ) -> Result<f64, BackendError> {
        let say = |e: cudarc::driver::DriverError| self.error(told(e));
        let mut flush = self.room::<u8>(FLUSH)?;
        for _ in 0..3 {
            f()?;
        }
        let flags = Some(driver::CUevent_flags::CU_EVENT_DEFAULT);
        let mut events = Vec::new();
        for _ in 0..repetitions {
            self.stream.memset_zeros(&mut flush).map_err(say)?;
            let begin = self.stream.record_event(flags).map_err(say)?;
            f()?;
            events.push((begin, self.stream.record_event(flags).map_err(say)?));
        }
        self.synchronize()?;
        let milliseconds = events.iter().map(|(begin, end)| begin.elapsed_ms(end).map_err(say));
        let mut times = milliseconds.collect::<Result<Vec<_>, _>>()?;
        times.sort_by(f32::total_cmp);
        Ok(f64::from(times[times.len() / 2]) / 1e3)
    }

    /// Bytes a second of a copy of `bytes`, counting both ways: what the memory gives.
    pub fn copy_rate(&self, bytes: usize) -> Result<f64, BackendError> {
        let (from, mut to) = (self.room::<u8>(bytes)?, self.room::<u8>(bytes)?);
        let time = self.seconds(20, || self.stream.memcpy_dtod(&from, &mut to).map_err(|e| self.error(told(e))))?;
        Ok(2.0 * bytes as f64 / time)
    }

    /// Bytes a second of reading so many, at least 16. The cache was emptied by writing: what a kernel reads drives out lines
    /// that must be written first, of which a copy leaves as many as it found. So this is the limit of what only reads.
    pub fn read_rate(&self, bytes: usize) -> Result<f64, BackendError> {
        let pieces = u32::try_from(bytes / 16).map_err(|e| self.error(format!("{bytes} bytes: {e}")))?;
        assert!(pieces > 0, "{bytes} bytes in pieces of 16");
        let (from, mut to) = (self.room::<u8>(bytes)?, self.room::<u32>(1)?);
        let function = self.function(&READ, "read_bytes", 0)?;
        let time = self.seconds(20, || {
            let mut launch = self.stream.launch_builder(&function);
            launch.arg(&from).arg(&mut to).arg(&pieces);
            // SAFETY: the kernel reads as many pieces as there are, and writes one word.
            unsafe { launch.launch(launch_of(pieces.div_ceil(256 * 8), 256, 0)) }.map_err(|e| self.error(told(e)))?;
            Ok(())
        })?;
        Ok(f64::from(pieces) * 16.0 / time)
    }
}
