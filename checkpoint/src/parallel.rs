//! Threads that read: while one waits for the disk or for an object, others wait too, or make sums.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::LazyLock;

/// Chunks that are read at one time, and held.
const AT_ONCE: usize = 8;

static THREADS: LazyLock<ThreadPool> = LazyLock::new(|| {
    let threads = ThreadPoolBuilder::new().num_threads(AT_ONCE).thread_name(|n| format!("chunks-{n}"));
    threads.build().expect("a process that reads a store may have a few threads")
});

/// Parallel iterators within run on those threads.
pub(crate) fn at_once<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    THREADS.install(work)
}
