//! Sessions over RDMA beside what perftest reaches on the same device, in the small machine (`src/vm.rs`): tensors of 1 MiB beside
//! `ib_write_bw`, round trips of small messages between actors beside `ib_send_lat -e`, whose figures are half a round trip.
//!
//! usage: rdma_rate LINK_SPEED: the example of that name, built with RDMA. Needs perftest.

use anyhow::{Context, Result, ensure};
use everstep_tests::Vm;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(400);
/// Turns of each.
const TURNS: usize = 3;

fn main() -> Result<()> {
    let ours = std::env::args().nth(1).context("usage: rdma_rate LINK_SPEED")?;
    let ours = std::path::absolute(ours)?;
    let beside = |tool: &str, more: &str| {
        format!(
            "{tool} -F -d rxe0 {more} >/dev/null 2>&1 & sleep 2; {tool} -F -d rxe0 {more} 10.99.0.1 2>&1 | grep '^ [0-9]'; wait"
        )
    };
    let turn = format!(
        "echo ib_write_bw; {}; echo ib_send_lat; {}; {} 1 128 1024 2>&1 || exit 1",
        beside("ib_write_bw", "-s 1048576 -n 128"),
        beside("ib_send_lat", "-e -s 100 -n 1000"),
        ours.display()
    );
    let ran = Vm::set_up()?.run(&vec![turn; TURNS].join("\n"), LIMIT)?;
    println!("{}", ran.output);
    ensure!(ran.status == 0, "status {}", ran.status);
    Ok(())
}
