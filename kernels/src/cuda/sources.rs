//! The kernels of `hopper/`, and how NVRTC makes machine code for sm_90a of them. Nothing here needs a GPU.

use super::failure::{Version, all_there};
use cudarc::nvrtc::{result, sys};
use std::ffi::CString;

/// A kernel file with the values that it is compiled for.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Of this variant.
    pub name: &'static str,
    text: &'static str,
    defines: &'static [(&'static str, u32)],
    /// Products and sums may become one operation.
    contracts: bool,
}

const GEMM: &str = include_str!("../../hopper/fp8_gemm.cu");
const HEADERS: [(&str, &str); 3] = [
    ("hopper.cuh", include_str!("../../hopper/hopper.cuh")),
    ("memory.cuh", include_str!("../../hopper/memory.cuh")),
    ("exact.cuh", include_str!("../../hopper/exact.cuh")),
];

macro_rules! file {
    ($name:literal, $contracts:literal) => {
        Source {
            name: $name,
            text: include_str!(concat!("../../hopper/", $name, ".cu")),
            defines: &[],
            contracts: $contracts,
        }
    };
}

type Defines<const N: usize> = [(&'static str, u32); N];

const AHEAD: u32 = 1;

/// A dense product's tile, its stages, and rows of tiles in a band.
const fn tile(rows: u32, columns: u32, stages: u32, band: u32, ahead: u32) -> Defines<7> {
    [("MATH", 2), ("BM", rows), ("BN", columns), ("STAGES", stages), ("BAND", band), ("AHEAD", ahead), ("GROUPED", 0)]
}

const fn gemm(name: &'static str, defines: &'static Defines<7>) -> Source {
    Source { name, text: GEMM, defines, contracts: true }
}

/// Dense products, by tile and length of sums.
pub(super) const DENSE_256X128: Source = gemm("fp8_gemm 256x128", &tile(256, 128, 3, 8, AHEAD));
pub(super) const DENSE_256X128_SHORT: Source = gemm("fp8_gemm 256x128 short", &tile(256, 128, 3, 16, AHEAD));
pub(super) const DENSE_128X176: Source = gemm("fp8_gemm 128x176", &tile(128, 176, 4, 4, 0));
/// Products grouped by expert.
pub(super) const GROUPED: Source = gemm(
    "fp8_gemm 256x128 grouped",
    &[("MATH", 2), ("BM", 256), ("BN", 128), ("STAGES", 3), ("BAND", 4), ("AHEAD", AHEAD), ("GROUPED", 1)],
);
/// Weight gradients, grouped over tokens.
pub(super) const WGRAD: Source = Source {
    name: "fp8_wgrad 128x128",
    text: include_str!("../../hopper/fp8_wgrad.cu"),
    defines: &[("MATH", 2), ("BN", 128), ("STAGES", 4), ("BAND", 8)],
    contracts: true,
};
pub(super) const QUANTISE: Source = file!("quantise", true);
pub(super) const BLOCKS: Source = file!("blocks", true);
pub(super) const NORM: Source = file!("norm", true);
pub(super) const SWIGLU: Source = file!("swiglu", true);
pub(super) const PERMUTE: Source = file!("permute", true);
pub(super) const TURN: Source = file!("turn", true);
pub(super) const GATE: Source = file!("gate", true);
pub(super) const READ: Source = file!("read", true);
/// As the CPU rounds: products in FP32, the gate's choice, and how heads are laid out.
pub(super) const PRODUCT: Source = file!("product", false);
pub(super) const CHOICE: Source = file!("choice", false);
pub(super) const HEADS: Source = file!("heads", false);
/// As the CPU rounds, for what is stored in FP32 and in BF16.
pub(super) static ELEMENTS: [Source; 2] =
    both("elements FP32", "elements BF16", include_str!("../../hopper/elements.cu"));
pub(super) static COMBINE: [Source; 2] = both("combine FP32", "combine BF16", include_str!("../../hopper/combine.cu"));

pub(super) static ADAMW: [Source; 2] = both("adamw FP32", "adamw BF16", include_str!("../../hopper/adamw.cu"));

const fn both(high: &'static str, low: &'static str, text: &'static str) -> [Source; 2] {
    [
        Source { name: high, text, defines: &[("LOW", 0)], contracts: false },
        Source { name: low, text, defines: &[("LOW", 1)], contracts: false },
    ]
}

/// Every file, in every variant that is used.
pub static SOURCES: [Source; 22] = [
    DENSE_256X128,
    DENSE_256X128_SHORT,
    DENSE_128X176,
    GROUPED,
    WGRAD,
    QUANTISE,
    BLOCKS,
    NORM,
    SWIGLU,
    PERMUTE,
    TURN,
    GATE,
    READ,
    PRODUCT,
    CHOICE,
    HEADS,
    ELEMENTS[0],
    ELEMENTS[1],
    COMBINE[0],
    COMBINE[1],
    ADAMW[0],
    ADAMW[1],
];

/// The version of the compiler, which is there.
pub(super) fn compiler() -> Result<Version, String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are of live integers.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().map_err(|e| format!("NVRTC: {e:?}"))?;
    Ok(Version { major, minor })
}

/// What a function needs, as the compiler reports it; bytes but for the registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub function: String,
    /// Registers of a thread at launch.
    pub registers: u32,
    /// Local memory of a thread.
    pub stack: u32,
    /// Bytes of registers that are written to local memory.
    pub spill_stores: u32,
    /// Bytes of registers that are read back.
    pub spill_loads: u32,
}

/// Machine code.
#[derive(Debug)]
pub struct Compiled {
    /// For the driver.
    pub cubin: Vec<u8>,
    /// Of each function.
    pub resources: Vec<Resources>,
}

impl Source {
    /// The value of a constant that it is compiled with. Panics if it has none of that name.
    pub(super) fn value(&self, name: &str) -> u32 {
        let found = self.defines.iter().find(|(n, _)| *n == name);
        found.unwrap_or_else(|| panic!("{} has no {name}", self.name)).1
    }

    fn options(&self) -> Vec<String> {
        let contracts = format!("--fmad={}", self.contracts);
        let fixed = ["--gpu-architecture=sm_90a", "-std=c++17", "--ptxas-options=-v", &contracts].map(str::to_owned);
        fixed.into_iter().chain(self.defines.iter().map(|(name, value)| format!("-D{name}={value}"))).collect()
    }

    fn program(&self) -> String {
        let width = self.defines.iter().find(|(name, _)| *name == "BN").map_or(String::new(), |(_, n)| wgmma(*n));
        width + self.text
    }

    /// What its machine code depends on, with the compiler's version. Needs NVRTC, as [`Self::compile`].
    pub(super) fn key(&self) -> Result<String, String> {
        let version = compiler()?;
        let mut hash = blake3::Hasher::new();
        let program = self.program();
        let options = self.options();
        let parts = HEADERS.iter().map(|(_, text)| *text).chain([program.as_str()]);
        for part in parts.chain(options.iter().map(String::as_str)) {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        Ok(format!("{}-{version}", hash.finalize().to_hex()))
    }

    /// Compiles it. The error is the compiler's log, or that there is no compiler.
    pub fn compile(&self) -> Result<Compiled, String> {
        // SAFETY: this only looks for the library; cudarc panics at the first call into one that is not there.
        let there = unsafe { sys::is_culib_present() };
        all_there(&[("NVRTC (libnvrtc)", there)]).map_err(|e| format!("{}: {e}", self.name))?;
        let text = |text: &str| CString::new(text).map_err(|e| e.to_string());
        let program = text(&self.program())?;
        let names = HEADERS.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>, _>>()?;
        let headers = HEADERS.iter().map(|(_, header)| text(header)).collect::<Result<Vec<_>, _>>()?;
        let (names, headers) = (pointers(&names), pointers(&headers));
        let mut handle = std::ptr::null_mut();
        let count = HEADERS.len() as i32;
        // SAFETY: every pointer is of a string that lives until the end of the function.
        let made = unsafe {
            sys::nvrtcCreateProgram(
                &raw mut handle,
                program.as_ptr(),
                c"kernel.cu".as_ptr(),
                count,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        made.result().map_err(|e| format!("{}: {e:?}", self.name))?;
        let compiled = self.compile_program(handle);
        // SAFETY: the program was created above and is not used afterwards.
        unsafe { result::destroy_program(handle) }.map_err(|e| format!("{}: {e:?}", self.name))?;
        compiled.map_err(|e| format!("{}: {e}", self.name))
    }

    fn compile_program(&self, handle: sys::nvrtcProgram) -> Result<Compiled, String> {
        // SAFETY: the program is alive; the buffer of the code has the size that the compiler names.
        unsafe {
            let done = result::compile_program(handle, &self.options());
            let log = result::get_program_log(handle).map_err(|e| format!("{e:?}"))?;
            let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|c| *c != 0).collect();
            let log = String::from_utf8_lossy(&log);
            done.map_err(|e| format!("{e:?}\n{log}"))?;
            let mut size = 0;
            sys::nvrtcGetCUBINSize(handle, &raw mut size).result().map_err(|e| format!("{e:?}"))?;
            let mut cubin = vec![0u8; size];
            sys::nvrtcGetCUBIN(handle, cubin.as_mut_ptr().cast()).result().map_err(|e| format!("{e:?}"))?;
            Ok(Compiled { cubin, resources: resources(&log) })
        }
    }
}

fn pointers(strings: &[CString]) -> Vec<*const std::ffi::c_char> {
    strings.iter().map(|s| s.as_ptr()).collect()
}

/// The tensor core's instruction for `columns`: PTX wants every accumulator spelt out.
fn wgmma(columns: u32) -> String {
    let count = columns / 2;
    let list = |f: &dyn Fn(u32) -> String| (0..count).map(f).collect::<Vec<_>>().join(", ");
    let (registers, outputs) = (list(&|i| format!("%{i}")), list(&|i| format!("\"+f\"(d[{i}])")));
    format!(
        "#define WGMMA(d, a, b, add) asm volatile(\"{{ .reg .pred p; setp.ne.b32 p, %{}, 0;\\n\
         wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 {{{registers}}}, %{}, %{}, p, 1, 1; }}\" : \
         {outputs} : \"l\"(a), \"l\"(b), \"r\"((int)(add)))\n",
        count + 2,
        count,
        count + 1
    )
}

/// What `ptxas -v` says of each function.
fn resources(log: &str) -> Vec<Resources> {
    let number = |line: &str, before: &str| -> u32 {
        let words: Vec<&str> = line[..line.find(before).unwrap_or(0)].split_whitespace().collect();
        words.last().and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    let mut found: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let function = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(Resources { function, registers: 0, stack: 0, spill_stores: 0, spill_loads: 0 });
        }
        let Some(last) = found.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            last.stack = number(line, " bytes stack frame");
            last.spill_stores = number(line, " bytes spill stores");
            last.spill_loads = number(line, " bytes spill loads");
        }
        if line.contains("Used ") {
            last.registers = number(line, " registers");
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compilers_report_is_read() {
        let log = "ptxas info    : Compiling entry function 'a' for 'sm_90a'\n\
                   ptxas info    : Function properties for a\n    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
                   ptxas info    : Used 168 registers, used 1 barriers\n\
                   ptxas info    : Compiling entry function 'b' for 'sm_90a'\n\
                   ptxas info    : Used 40 registers\n";
        let a = Resources { function: "a".into(), registers: 168, stack: 16, spill_stores: 4, spill_loads: 8 };
        let b = Resources { function: "b".into(), registers: 40, stack: 0, spill_stores: 0, spill_loads: 0 };
        assert_eq!(resources(log), [a, b]);
    }

    #[test]
    fn an_instruction_names_every_accumulator() {
        let text = wgmma(16);
        assert!(text.contains("m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1;"));
        assert!(text.contains("setp.ne.b32 p, %10, 0;") && text.ends_with("\"r\"((int)(add)))\n"));
    }
}
