//! `everstep bench`: figures as JSON lines, each with what bounds it, all measured in this run.

use anyhow::Result;
use everstep_kernels::{Backend, CpuBackend, Philox, Tensor};
use std::process::ExitCode;
use std::time::Instant;

const REPETITIONS: usize = 9;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn time(mut f: impl FnMut()) -> f64 {
    f();
    let run = |_| {
        let began = Instant::now();
        f();
        began.elapsed().as_secs_f64()
    };
    median((0..REPETITIONS).map(run).collect())
}

fn matrix(rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(rows, columns, Philox::new(1, 9, rows as u32).normals(rows * columns, 1.0))
}

/// GFLOPS of fused multiply-adds in registers on one core: the limit of an f32 product.
fn multiply_add_limit() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // One product whose operands stay in the first-level cache comes closest without assembly.
        let (x, w) = (matrix(96, 256), matrix(96, 256));
        let seconds = time(|| {
            for _ in 0..200 {
                std::hint::black_box(CpuBackend.linear(&x, &w));
            }
        });
        return 2.0 * 96.0 * 96.0 * 256.0 * 200.0 / seconds / 1e9;
    }
    let (x, w) = (matrix(48, 256), matrix(48, 256));
    let seconds = time(|| {
        for _ in 0..200 {
            std::hint::black_box(CpuBackend.linear(&x, &w));
        }
    });
    2.0 * 48.0 * 48.0 * 256.0 * 200.0 / seconds / 1e9
}

pub(crate) fn run() -> Result<ExitCode> {
    let limit = multiply_add_limit();
    for (rows, out, input) in [(2048, 512, 768), (2048, 2048, 2048), (512, 128, 128), (512, 384, 128)] {
        let (x, w) = (matrix(rows, input), matrix(out, input));
        let flops = 2.0 * (rows * out * input) as f64;
        let seconds = time(|| {
            std::hint::black_box(CpuBackend.linear(&x, &w));
        });
        let line = serde_json::json!({
            "bench": "linear, f32, one thread", "rows": rows, "out": out, "in": input,
            "gflops": flops / seconds / 1e9, "in_cache_gflops": limit,
        });
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}
