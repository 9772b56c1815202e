//! Names the commit of which the program is built: for `--version`, and for whoever replays what it found.

use std::process::Command;

fn main() {
    let asked = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    let commit = asked.ok().filter(|output| output.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    let commit = commit.map_or("unknown commit".to_owned(), |commit| commit.trim().to_owned());
    println!("cargo::rustc-env=EVERSTEP_VERSION={} ({commit})", env!("CARGO_PKG_VERSION"));
    // It changes with every commit.
    println!("cargo::rerun-if-changed=../../.git/logs/HEAD");
}
