//! What a panic says: what and where at once, then its backtrace, if one is wanted, from a thread of its own.
//!
//! To find the names of its functions takes longer than a node may be silent, and the thread that panics, or one that logs,
//! may be the one that sends beats.
//! - PA-1: neither a thread that panics nor one that writes to standard error waits for names. (Who takes a backtrace for an error does: the
//!   library lets one at a time. Nothing that beats depend on takes any.)

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether names are being found. The library takes no second backtrace meanwhile: its thread would wait.
static NAMING: AtomicBool = AtomicBool::new(false);

/// Says so from now on.
pub(crate) fn say() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        // Not `eprintln`: a panic in here would end the process.
        let _ = writeln!(std::io::stderr(), "thread '{}' {info}", thread.name().unwrap_or("without a name"));
        if NAMING.swap(true, Ordering::AcqRel) {
            let _ = writeln!(std::io::stderr(), "(without a backtrace: that of an earlier panic is being written)");
            return;
        }
        let backtrace = Backtrace::capture();
        if backtrace.status() != BacktraceStatus::Captured {
            NAMING.store(false, Ordering::Release);
            return;
        }
        // The main thread's panic ends the process: nobody waits for it, and another thread might not finish.
        if thread.name() == Some("main") {
            write(&backtrace);
        } else {
            // Without that thread there are the words before.
            let named = std::thread::Builder::new().name("backtrace".to_owned()).spawn(move || write(&backtrace));
            if named.is_err() {
                NAMING.store(false, Ordering::Release);
            }
        }
    }));
}

fn write(backtrace: &Backtrace) {
    // Written to standard error directly, it would lock it while names are found.
    let text = format!("{backtrace}\n");
    NAMING.store(false, Ordering::Release);
    let _ = std::io::stderr().write_all(text.as_bytes());
}
