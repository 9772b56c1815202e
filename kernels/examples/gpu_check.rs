//! Runs what the CUDA backend has against the CPU backend through the same trait, on a real GPU, and
//! measures it. Prints JSON lines; fails if anything differs more than it may, or if there is no GPU.

use everstep_kernels::{Backend, BackendError, CpuBackend, CudaBackend, Philox, Role, Tensor};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

fn random(rows: usize, columns: usize, name: u32) -> Arc<Vec<f32>> {
    Arc::new(Philox::new(3, 50, name).normals(rows * columns, 1.0))
}

/// Largest difference relative to the largest element.
fn difference(a: &[f32], b: &[f32]) -> f64 {
    let scale = b.iter().fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / scale
}

fn seconds(backend: &dyn Backend, mut f: impl FnMut() -> Tensor) -> Result<f64, BackendError> {
    f();
    backend.synchronize()?;
    let mut times = Vec::new();
    for _ in 0..9 {
        let began = Instant::now();
        for _ in 0..10 {
            f();
        }
        backend.synchronize()?;
        times.push(began.elapsed().as_secs_f64() / 10.0);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn rms_norm(gpu: &dyn Backend, rows: usize, columns: usize) -> Result<bool, BackendError> {
    let (x, w) = (random(rows, columns, 1), random(1, columns, 2));
    let run = |b: &dyn Backend| b.rms_norm(&b.upload(rows, columns, x.clone()), &b.upload(1, columns, w.clone()), 1e-6);
    let (got, want) = (gpu.read(&run(gpu))?, CpuBackend::FP32.read(&run(&CpuBackend::FP32))?);
    let same = got.iter().zip(want.iter()).all(|(a, b)| a.to_bits() == b.to_bits());
    let (gx, gw) = (gpu.upload(rows, columns, x), gpu.upload(1, columns, w));
    let time = seconds(gpu, || gpu.rms_norm(&gx, &gw, 1e-6))?;
    let bytes = 8.0 * (rows * columns) as f64;
    println!(
        "{{\"op\":\"rms_norm\",\"rows\":{rows},\"columns\":{columns},\"same_bits_as_cpu\":{same},\"us\":{:.1},\"gb_per_s\":{:.0},\"limit_gb_per_s\":3350}}",
        time * 1e6,
        bytes / time / 1e9
    );
    Ok(same)
}

fn linear(gpu: &dyn Backend, rows: usize, out: usize, input: usize) -> Result<bool, BackendError> {
    let (x, w, dy) = (random(rows, input, 3), random(out, input, 4), random(rows, out, 5));
    let forward = |b: &dyn Backend| b.linear(&b.upload(rows, input, x.clone()), &b.upload(out, input, w.clone()));
    let backward =
        |b: &dyn Backend| b.linear_backward_input(&b.upload(rows, out, dy.clone()), &b.upload(out, input, w.clone()));
    let y = difference(&gpu.read(&forward(gpu))?, &CpuBackend::FP32.read(&forward(&CpuBackend::FP32))?);
    let dx = difference(&gpu.read(&backward(gpu))?, &CpuBackend::FP32.read(&backward(&CpuBackend::FP32))?);
    let (gx, gw) = (gpu.upload(rows, input, x), gpu.upload(out, input, w));
    let time = seconds(gpu, || gpu.linear(&gx, &gw, Role::Head))?;
    println!(
        "{{\"op\":\"linear f32\",\"rows\":{rows},\"out\":{out},\"in\":{input},\"difference_y\":{y:e},\"difference_dx\":{dx:e},\"us\":{:.1},\"tflops\":{:.2},\"limit_tflops\":67}}",
        time * 1e6,
        2.0 * (rows * out * input) as f64 / time / 1e12
    );
    // Rounding of sums of `input` f32 terms in another order, relative to the largest element.
    let tolerance = 1e-5;
    Ok(y < tolerance && dx < tolerance)
}

fn check() -> Result<bool, BackendError> {
    let gpu = CudaBackend::new(0)?;
    println!("{{\"device_class\":\"{}\"}}", gpu.class());
    let mut good = true;
    for (rows, columns) in [(1, 7), (3, 16), (17, 129), (1000, 1536), (4096, 7168)] {
        good &= rms_norm(&gpu, rows, columns)?;
    }
    for (rows, out, input) in [(1, 5, 3), (17, 33, 65), (300, 70, 40), (512, 384, 128), (4096, 2112, 1024)] {
        good &= linear(&gpu, rows, out, input)?;
    }
    // What is not there yet is an error at the next read, and it sticks.
    let x = gpu.upload(2, 2, random(2, 2, 6));
    let sum = gpu.add(&x, &x);
    let refused = matches!(gpu.read(&sum), Err(BackendError::Unsupported { operation: "add", .. }));
    println!("{{\"unsupported_operation_is_an_error_at_the_read\":{refused}}}");
    Ok(good && refused && gpu.read(&x).is_err())
}

fn main() -> ExitCode {
    match check() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
