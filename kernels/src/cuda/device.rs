//! One GPU: its stream, the kernels that were asked for, descriptors of the copy engine, and launches.

use super::failure::{Version, all_there, loads, no_room, told};
use super::memory::Memory;
use super::sources::{Source, compiler};
use crate::backend::BackendError;
use cudarc::driver::sys::{
    CUfunction_attribute, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, CudaView, DeviceRepr, DeviceSlice, DriverError, LaunchConfig,
    ValidAsZeroBits, sys,
};
use cudarc::nvrtc::Ptx;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::c_void;
use std::fmt::{Debug, Display};
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError};

/// Where machine code is kept between processes: compiling takes seconds. Keys name contents, so nothing grows stale.
pub trait Cubins: Send + Sync + Debug {
    /// What was kept under a key.
    fn get(&self, key: &str) -> Option<Vec<u8>>;
    /// Keeps it, if that can be done.
    fn put(&self, key: &str, cubin: &[u8]);
}

/// Keeps nothing.
#[derive(Debug)]
pub struct NoCubins;

impl Cubins for NoCubins {
    fn get(&self, _: &str) -> Option<Vec<u8>> {
        None
    }

    fn put(&self, _: &str, _: &[u8]) {}
}

/// Whether the libraries are there: cudarc panics at the first call into one that is not.
fn libraries() -> Result<(), String> {
    // SAFETY: these only look for shared libraries and have no other effect.
    let found = unsafe {
        [
            ("the CUDA driver (libcuda)", cudarc::driver::sys::is_culib_present()),
            ("NVRTC (libnvrtc)", cudarc::nvrtc::sys::is_culib_present()),
            ("cuBLASLt (libcublasLt)", cudarc::cublaslt::sys::is_culib_present()),
        ]
    };
    all_there(&found)
}

/// The version of CUDA that the driver knows.
fn driver() -> Result<Version, String> {
    let mut number = 0;
    // SAFETY: the pointer is of a live integer; the library is there.
    unsafe { sys::cuDriverGetVersion(&raw mut number) }.result().map_err(told)?;
    Ok(Version::of_number(number))
}

/// See the module.
#[derive(Debug)]
pub struct Gpu {
    name: String,
    pub(super) stream: Arc<CudaStream>,
    /// Multiprocessors.
    pub(super) processors: u32,
    capability: (i32, i32),
    cubins: Box<dyn Cubins>,
    loaded: Mutex<BTreeMap<&'static str, Loaded>>,
}

/// A kernel file on the GPU, and its functions that were asked for, with the shared memory that they may use.
#[derive(Debug)]
struct Loaded {
    module: Arc<CudaModule>,
    functions: BTreeMap<&'static str, (CudaFunction, u32)>,
}

impl Gpu {
    /// The GPU with this number.
    pub fn new(ordinal: usize, cubins: Box<dyn Cubins>) -> Result<Self, BackendError> {
        let name = format!("cuda:{ordinal}");
        let failed = |reason: String| BackendError::Device { device: name.clone(), reason };
        libraries().map_err(&failed)?;
        loads(driver().map_err(&failed)?, compiler().map_err(&failed)?).map_err(&failed)?;
        let say = |e: DriverError| failed(told(e));
        let context = CudaContext::new(ordinal).map_err(say)?;
        let processors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(processors).map_err(say)? as u32;
        let capability = context.compute_capability().map_err(say)?;
        // SAFETY: all work is on one stream, so no operation has to wait for another's event; they would be made with each memory.
        unsafe { context.disable_event_tracking() };
        let stream = context.default_stream();
        Ok(Self { name, stream, processors, capability, cubins, loaded: Mutex::default() })
    }

    /// The card's own name.
    pub fn card(&self) -> Result<String, BackendError> {
        self.stream.context().name().map_err(|e| self.error(told(e)))
    }

    /// "sm_90" and the like.
    pub(super) fn architecture(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }

    pub(super) fn error(&self, reason: impl Display) -> BackendError {
        BackendError::Device { device: self.name.clone(), reason: reason.to_string() }
    }

    /// Makes its context the thread's: what is not cudarc's safe half works on that.
    pub(super) fn bind(&self) -> Result<(), BackendError> {
        self.stream.context().bind_to_thread().map_err(|e| self.error(told(e)))
    }

    /// Bytes of its memory that are free, once what was enqueued is done, and all.
    pub fn memory(&self) -> Result<(usize, usize), BackendError> {
        self.synchronize()?;
        self.stream.context().mem_get_info().map_err(|e| self.error(told(e)))
    }

    pub(super) fn synchronize(&self) -> Result<(), BackendError> {
        self.stream.synchronize().map_err(|e| self.error(told(e)))
    }

    /// A function of a kernel file, compiled at its first use, that may use so much shared memory.
    pub(super) fn function(
        &self,
        source: &'static Source,
        name: &'static str,
        shared: u32,
    ) -> Result<CudaFunction, BackendError> {
        self.bind()?;
        // Held while a file is compiled: whoever needs it too waits for it.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match loaded.entry(source.name) {
            Entry::Occupied(file) => file.into_mut(),
            Entry::Vacant(place) => place.insert(Loaded { module: self.module(source)?, functions: BTreeMap::new() }),
        };
        if let Some((function, allowed)) = file.functions.get(name)
            && *allowed >= shared
        {
            return Ok(function.clone());
        }
        let say = |e: DriverError| self.error(format!("{name} of {}: {}", source.name, told(e)));
        let function = file.module.load_function(name).map_err(say)?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, shared as i32).map_err(say)?;
        file.functions.insert(name, (function.clone(), shared));
        Ok(function)
    }

    /// Blocks of a function that it has at once.
    pub(super) fn resident(&self, function: &CudaFunction, threads: u32, shared: usize) -> Result<i32, BackendError> {
        let each = function.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None);
        Ok((each.map_err(|e| self.error(told(e)))? * self.processors) as i32)
    }

    fn module(&self, source: &Source) -> Result<Arc<CudaModule>, BackendError> {
        if self.capability != (9, 0) {
            let needs = format!("{} is compiled for sm_90a, this GPU is {}", source.name, self.architecture());
            return Err(self.error(needs));
        }
        let key = source.key().map_err(|e| self.error(e))?;
        let load = |cubin: Vec<u8>| self.stream.context().load_module(Ptx::from_binary(cubin));
        // What was kept may be damaged, and is then made again.
        if let Some(Ok(module)) = self.cubins.get(&key).map(load) {
            return Ok(module);
        }
        let compiled = source.compile().map_err(|e| self.error(e))?;
        self.cubins.put(&key, &compiled.cubin);
        load(compiled.cubin).map_err(|e| self.error(format!("{}: {}", source.name, told(e))))
    }
}

impl Gpu {
    /// Memory of an operation's result; nothing is in it yet.
    pub(super) fn room<T: DeviceRepr>(&self, elements: usize) -> Result<Memory<T>, BackendError> {
        // SAFETY: any bits are a number; callers write what they mean before they read it.
        let memory = unsafe { self.stream.alloc(elements.max(1)) }.map_err(|e| {
            self.error(no_room(elements * size_of::<T>(), e, self.stream.context().mem_get_info().ok()))
        })?;
        if elements > 0 {
            return Ok(Memory::new(memory));
        }
        // The driver promises nothing of an allocation without bytes, so an empty matrix has an element that nobody sees.
        // SAFETY: the memory is of this stream, belongs to nothing else, and is longer than what is said of it.
        Ok(Memory::new(unsafe { self.stream.upgrade_device_ptr(memory.leak(), 0) }))
    }

    /// The same, of zeros.
    pub(super) fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, elements: usize) -> Result<Memory<T>, BackendError> {
        let mut memory = self.room(elements)?;
        if elements > 0 {
            self.stream.memset_zeros(&mut memory).map_err(|e| self.error(told(e)))?;
        }
        Ok(memory)
    }

    /// A copy of all parts, one after another.
    pub(super) fn joined<T: DeviceRepr>(&self, parts: &[CudaView<'_, T>]) -> Result<Memory<T>, BackendError> {
        let (mut all, mut at) = (self.room::<T>(parts.iter().map(DeviceSlice::len).sum())?, 0);
        for part in parts.iter().filter(|part| !part.is_empty()) {
            let mut to = all.slice_mut(at..at + part.len());
            self.stream.memcpy_dtod(part, &mut to).map_err(|e| self.error(told(e)))?;
            at += part.len();
        }
        Ok(all)
    }
}

/// Launches a function with its arguments, in its order, whose lengths the caller has asserted.
macro_rules! run {
    ($gpu:expr, $source:expr, $name:literal, $shape:expr, $($argument:expr),+ $(,)?) => {{
        let (gpu, (blocks, threads, shared)): (&$crate::cuda::Gpu, (usize, u32, usize)) = (&$gpu, $shape);
        gpu.function(&$source, $name, shared as u32).and_then(|function| {
            let mut launch = gpu.stream.launch_builder(&function);
            let config = $crate::cuda::device::launch_of(blocks as u32, threads, shared as u32);
            // SAFETY: the arguments are the kernel's, and as long as it expects, which callers assert; it checks its rows.
            let done = run!(@with launch, unsafe { launch.launch(config) }; $($argument),+);
            done.map(drop).map_err(|e| gpu.error(format!("{}: {}", $name, $crate::cuda::failure::told(e))))
        })
    }};
    // One in another, so that arguments live until the launch.
    (@with $launch:ident, $go:expr; $argument:expr $(, $more:expr)*) => {
        match $argument {
            argument => {
                cudarc::driver::PushKernelArg::arg(&mut $launch, argument);
                run!(@with $launch, $go; $($more),*)
            }
        }
    };
    (@with $launch:ident, $go:expr;) => { $go };
}
pub(super) use run;

/// An argument of [`Gpu::launch_early`].
pub(super) fn pointer<T: DeviceRepr>(argument: &T) -> *mut c_void {
    std::ptr::from_ref(argument).cast_mut().cast()
}

impl Gpu {
    /// Launches a function that may begin while the launch before it ends: its blocks take places that are free, and wait themselves.
    ///
    /// # Safety
    ///
    /// The arguments are the function's, and it touches nothing of the launch before it without waiting for that.
    pub(super) unsafe fn launch_early<const N: usize>(
        &self,
        function: &CudaFunction,
        config: LaunchConfig,
        mut arguments: [*mut c_void; N],
    ) -> Result<(), BackendError> {
        self.bind()?;
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let ((x, y, z), (across, down, deep)) = (config.grid_dim, config.block_dim);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: across,
            blockDimY: down,
            blockDimZ: deep,
            sharedMemBytes: config.shared_mem_bytes,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: 1,
        };
        // SAFETY: all that is pointed to outlives the call, which copies it; the rest is the caller's promise.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|e| self.error(told(e)))
    }
}

/// A launch of `grid` blocks in one dimension.
pub(super) fn launch_of(grid: u32, threads: u32, shared: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (grid.max(1), 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: shared }
}

/// A box of a matrix for the copy engine.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct TensorMap(CUtensorMap);

// SAFETY: it is plain data that kernels take by value.
unsafe impl DeviceRepr for TensorMap {}

/// Elements as the copy engine counts them.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Byte,
    F32,
    Bf16,
}

/// What a box is cut from: dimensions and box innermost first; strides in bytes of all but the innermost.
pub(super) struct Boxes<'a> {
    pub(super) kind: Kind,
    pub(super) dimensions: &'a [usize],
    pub(super) strides: &'a [usize],
    pub(super) size: &'a [usize],
    /// Rows of 128 bytes are swizzled.
    pub(super) swizzled: bool,
}

impl Gpu {
    /// The descriptor of boxes in the memory at `address`.
    pub(super) fn tensor_map(&self, address: sys::CUdeviceptr, boxes: &Boxes<'_>) -> Result<TensorMap, BackendError> {
        self.bind()?;
        let rank = boxes.dimensions.len();
        let wide = |list: &[usize]| list.iter().map(|n| *n as u64).collect::<Vec<_>>();
        let (dimensions, strides) = (wide(boxes.dimensions), wide(boxes.strides));
        let size: Vec<u32> = boxes.size.iter().map(|n| *n as u32).collect();
        let kind = match boxes.kind {
            Kind::Byte => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            Kind::F32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Kind::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let swizzle = if boxes.swizzled {
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B
        } else {
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE
        };
        let mut map = MaybeUninit::uninit();
        // SAFETY: the lists have `rank` elements (strides one less), and outlive the call; the driver checks the rest
        // and writes the descriptor whole if it is content.
        unsafe {
            cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                kind,
                rank as u32,
                address as *mut std::ffi::c_void,
                dimensions.as_ptr(),
                strides.as_ptr(),
                size.as_ptr(),
                vec![1; rank].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .map_err(|e| self.error(format!("boxes {:?} of {dimensions:?}: {}", boxes.size, told(e))))?;
            Ok(TensorMap(map.assume_init()))
        }
    }
}
