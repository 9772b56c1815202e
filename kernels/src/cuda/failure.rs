//! What the driver's errors mean to whoever runs a job: what is missing, and what was expected. Nothing here needs a GPU.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult as Code;

/// The version of CUDA that a driver must know, at least: its functions are called by their names.
const DRIVER_LEAST: Version = Version { major: 12, minor: 0 };

/// A version of CUDA, as the driver and the compiler name theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    pub(super) major: i32,
    pub(super) minor: i32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Version {
    /// As the driver counts: 13000 is 13.0.
    pub(super) fn of_number(number: i32) -> Self {
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

/// Libraries that are not there, by their names.
pub(super) fn all_there(found: &[(&str, bool)]) -> Result<(), String> {
    let missing: Vec<&str> = found.iter().filter(|(_, there)| !there).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(", ");
    Err(format!("not found: {list}. They are looked for where the system's linker looks, and in LD_LIBRARY_PATH"))
}

/// Whether a driver loads what a compiler makes: machine code of one major version needs a driver that knows it.
pub(super) fn loads(driver: Version, compiler: Version) -> Result<(), String> {
    let needed = DRIVER_LEAST.max(Version { minor: 0, ..compiler });
    if driver >= needed {
        return Ok(());
    }
    Err(format!(
        "the driver knows CUDA {driver}, and NVRTC {compiler} makes code for CUDA {needed} or newer: a newer driver is needed, \
         or an older NVRTC"
    ))
}

/// An error of the driver in words, with its own name for it.
pub(super) fn told(error: DriverError) -> String {
    match meaning(error.0) {
        Some(meaning) => format!("{meaning} ({:?})", error.0),
        None => format!("{:?}", error.0),
    }
}

/// An allocation that failed, with what the GPU has of memory if that is known.
pub(super) fn no_room(bytes: usize, error: DriverError, memory: Option<(usize, usize)>) -> String {
    match memory {
        Some((free, all)) if error.0 == Code::CUDA_ERROR_OUT_OF_MEMORY => {
            format!("out of GPU memory: {bytes} bytes were asked for, {free} of {all} are free ({:?})", error.0)
        }
        _ => format!("{bytes} bytes of memory: {}", told(error)),
    }
}

/// What is missing, and what was expected.
fn meaning(code: Code) -> Option<&'static str> {
    Some(match code {
        Code::CUDA_ERROR_NO_DEVICE => {
            "no GPU: the driver is there and sees none (is one hidden by CUDA_VISIBLE_DEVICES?)"
        }
        Code::CUDA_ERROR_INVALID_DEVICE => "no GPU with this number",
        Code::CUDA_ERROR_STUB_LIBRARY => {
            "libcuda is the toolkit's stub, not a driver: the driver's own must be found first"
        }
        Code::CUDA_ERROR_DEVICE_UNAVAILABLE => "another process has this GPU for itself",
        Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            "the driver is older than the compiler that made this PTX: a newer driver is needed, or an older NVRTC"
        }
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU => {
            "no machine code for this GPU: the kernels are compiled for sm_90a, so a Hopper GPU is needed"
        }
        Code::CUDA_ERROR_INVALID_IMAGE | Code::CUDA_ERROR_INVALID_SOURCE => {
            "the driver does not take this machine code: it is damaged, or of a newer CUDA than the driver's"
        }
        Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "libcuda and the kernel's driver are of different versions: both must be of one release (restart after an update)"
        }
        Code::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "CUDA's forward compatibility is not for this GPU: a driver that knows this CUDA itself is needed"
        }
        Code::CUDA_ERROR_SYSTEM_NOT_READY => {
            "the GPU's services are not running (nvidia-fabricmanager, where GPUs are linked)"
        }
        Code::CUDA_ERROR_OUT_OF_MEMORY => "out of GPU memory",
        Code::CUDA_ERROR_ECC_UNCORRECTABLE => "the GPU's memory is damaged: an error that it cannot correct",
        Code::CUDA_ERROR_ILLEGAL_ADDRESS => {
            "a kernel read or wrote memory that is not its own: nothing of this process can run there any more"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn version(major: i32, minor: i32) -> Version {
        Version { major, minor }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(all_there(&[("a", true), ("b", true)]), Ok(()));
        let error = all_there(&[("a", false), ("b", true), ("c", false)]).expect_err("two are missing");
        assert!(error.starts_with("not found: a, c. ") && error.contains("LD_LIBRARY_PATH"), "{error}");
    }

    #[test]
    fn a_driver_loads_code_of_its_major_version() {
        assert_eq!(Version::of_number(13_000), version(13, 0));
        assert_eq!(Version::of_number(12_040), version(12, 4));
        for (driver, compiler) in [((13, 0), (13, 0)), ((13, 0), (13, 5)), ((13, 1), (12, 9)), ((12, 0), (12, 9))] {
            assert_eq!(loads(version(driver.0, driver.1), version(compiler.0, compiler.1)), Ok(()));
        }
        let error = loads(version(12, 4), version(13, 0)).expect_err("an older driver");
        assert!(error.contains("12.4") && error.contains("NVRTC 13.0") && error.contains("13.0 or newer"), "{error}");
        assert!(loads(version(11, 8), version(11, 8)).is_err(), "its functions are not all there");
    }

    #[test]
    fn errors_say_what_is_missing() {
        for (code, words) in [
            (Code::CUDA_ERROR_NO_DEVICE, "no GPU"),
            (Code::CUDA_ERROR_INVALID_DEVICE, "no GPU with this number"),
            (Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "a newer driver is needed"),
            (Code::CUDA_ERROR_NO_BINARY_FOR_GPU, "a Hopper GPU is needed"),
            (Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "both must be of one release"),
            (Code::CUDA_ERROR_OUT_OF_MEMORY, "out of GPU memory"),
        ] {
            let told = told(DriverError(code));
            assert!(told.contains(words) && told.contains(&format!("{code:?}")), "{told}");
        }
        // Others keep the driver's name.
        assert_eq!(told(DriverError(Code::CUDA_ERROR_LAUNCH_FAILED)), "CUDA_ERROR_LAUNCH_FAILED");
    }

    #[test]
    fn an_allocation_that_fails_says_what_is_free() {
        let full = no_room(4096, DriverError(Code::CUDA_ERROR_OUT_OF_MEMORY), Some((1024, 8192)));
        assert!(full.starts_with("out of GPU memory: 4096 bytes were asked for, 1024 of 8192 are free"), "{full}");
        let unknown = no_room(4096, DriverError(Code::CUDA_ERROR_OUT_OF_MEMORY), None);
        assert!(unknown.contains("4096 bytes") && unknown.contains("out of GPU memory"), "{unknown}");
        let other = no_room(4096, DriverError(Code::CUDA_ERROR_NO_DEVICE), Some((1024, 8192)));
        assert!(other.contains("no GPU") && !other.contains("8192"), "{other}");
    }
}
