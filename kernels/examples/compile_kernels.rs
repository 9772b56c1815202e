//! Compiles every kernel for sm_90a, without a GPU, and prints what each function needs as the table of
//! docs/measurements/hopper-resources.md. Fails if a kernel does not compile or keeps registers in local memory.

use everstep_kernels::SOURCES;
use std::process::ExitCode;

fn main() -> ExitCode {
    println!("| file and variant | function | registers | stack | spilled |");
    println!("|---|---|---|---|---|");
    let mut good = true;
    for source in SOURCES {
        match source.compile() {
            Ok(compiled) => {
                good &= !compiled.resources.is_empty();
                for r in compiled.resources {
                    let spilled = r.spill_stores + r.spill_loads;
                    // As the card gives them out. ptxas takes one more or less from run to run.
                    let registers = r.registers.next_multiple_of(8);
                    println!("| {} | {} | {registers} | {} | {spilled} |", source.name, r.function, r.stack);
                    good &= spilled == 0 && r.stack == 0 && r.registers > 0;
                }
            }
            Err(error) => {
                eprintln!("{error}");
                good = false;
            }
        }
    }
    if !good {
        eprintln!("a kernel does not compile, or uses local memory");
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
