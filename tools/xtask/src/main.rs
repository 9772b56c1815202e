//! `cargo xtask verify` checks the tree and never edits it; `cargo xtask fix` edits.

mod tidy;

use anyhow::{Context, Result, anyhow, bail};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let task = std::env::args().nth(1);
    let result = match task.as_deref() {
        Some("verify") => verify(),
        Some("fix") => fix(),
        _ => Err(anyhow!("expected: cargo xtask verify | fix")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn cargo(arguments: &[&str], warnings_denied: bool) -> Result<()> {
    eprintln!("cargo {}", arguments.join(" "));
    let mut command = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command.args(arguments);
    if warnings_denied {
        command.env("RUSTDOCFLAGS", "-D warnings");
    }
    let status = command.status().context("cannot run cargo")?;
    if status.success() { Ok(()) } else { bail!("cargo {} failed", arguments.join(" ")) }
}

fn verify() -> Result<()> {
    tidy::check()?;
    cargo(&["fmt", "--all", "--check"], false)?;
    let rdma = "everstep/rdma,everstep-transport/rdma";
    cargo(&["clippy", "--workspace", "--features", rdma, "--all-targets", "--", "-D", "warnings"], false)?;
    // By themselves without what the program asks of them: RDMA, CUDA.
    cargo(
        &["clippy", "-p", "everstep-transport", "-p", "everstep-kernels", "--all-targets", "--", "-D", "warnings"],
        false,
    )?;
    cargo(&["doc", "--workspace", "--features", rdma, "--no-deps", "--document-private-items"], true)
}

fn fix() -> Result<()> {
    cargo(&["fmt", "--all"], false)?;
    cargo(&["clippy", "--workspace", "--all-targets", "--fix", "--allow-dirty"], false)
}
