//! `everstep bench`: figures as JSON lines, each with what bounds it, all measured in this run.

mod control;
mod cubins;
mod gpu;
mod recovery;
mod steady;
mod torch;

use anyhow::Result;
use everstep_kernels::{Backend, CpuBackend, Philox, Role, Tensor, multiply_add_limit, peer_linear};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

const REPETITIONS: usize = 9;

pub(crate) fn median(mut times: Vec<f64>) -> f64 {
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

/// What can be measured.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum What {
    /// What failures cost a job of real processes, by what failed; and its goodput.
    Recovery {
        /// The plan of the kills.
        #[arg(long, default_value = "configs/chaos/actors.toml")]
        plan: PathBuf,
        /// The configuration.
        #[arg(long, default_value = "configs/quickstart.toml")]
        config: PathBuf,
        /// Override a key of the configuration.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// What mirrors and checkpoints cost a job in which nothing fails.
    Steady {
        /// The configuration.
        #[arg(long, default_value = "configs/thirty.toml")]
        config: PathBuf,
        /// Override a key of the configuration.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// What the death of a node costs the supervisor of the largest job, without numbers and without a wire.
    Control {
        /// The configuration.
        #[arg(long, default_value = "configs/deepseek-v3.toml")]
        config: PathBuf,
        /// Override a key of the configuration.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    #[command(flatten)]
    Gpu(gpu::What),
}

/// Measures.
pub(crate) fn run(what: Option<What>) -> Result<ExitCode> {
    match what {
        Some(What::Recovery { plan, config, set }) => recovery::run(&plan, &config, &set)?,
        Some(What::Steady { config, set }) => steady::run(&config, &set)?,
        Some(What::Control { config, set }) => control::run(&config, &set)?,
        Some(What::Gpu(what)) => gpu::run(what)?,
        None => products()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Our product, the library's own beside it, and the machine's limit.
fn products() -> Result<()> {
    let limit = multiply_add_limit();
    for (rows, out, input) in [(2048, 512, 768), (2048, 2048, 2048), (512, 128, 128), (512, 384, 128), (3, 128, 128)] {
        let (x, w) = (matrix(rows, input), matrix(out, input));
        let flops = 2.0 * (rows * out * input) as f64;
        let ours = time(|| {
            std::hint::black_box(CpuBackend::FP32.linear(&x, &w, Role::Projection));
        });
        let (x, w) = (CpuBackend::FP32.read(&x)?, CpuBackend::FP32.read(&w)?);
        let mut y = vec![0.0; rows * out];
        let peer = time(|| peer_linear(&x, &w, std::hint::black_box(&mut y), rows, out, input));
        let line = serde_json::json!({
            "bench": "linear, f32, one thread", "rows": rows, "out": out, "in": input,
            "gflops": flops / ours / 1e9, "peer": "gemm crate alone", "peer_gflops": flops / peer / 1e9,
            "limit": "multiply-adds in registers", "limit_gflops": limit,
        });
        println!("{line}");
    }
    Ok(())
}
