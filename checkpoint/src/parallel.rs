//! Threads that read: while one waits for the disk or for an object, others wait too, or make sums.

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::LazyLock;

/// Chunks that are read at one time, and held.
const AT_ONCE: usize = 8;

static THREADS: LazyLock<ThreadPool> = LazyLock::new(|| {
    let threads = ThreadPoolBuilder::new().num_threads(AT_ONCE).thread_name(|n| format!("chunks-{n}"));
    threads.build().expect("a process that reads a store may have a few threads")
});

/// Does something with each of them, on those threads if it `waits`.
pub(crate) fn each<T: Send, R: Send>(waits: bool, items: Vec<T>, work: impl Fn(T) -> R + Send + Sync) -> Vec<R> {
    if waits {
        THREADS.install(|| items.into_par_iter().map(work).collect())
    } else {
        items.into_iter().map(work).collect()
    }
}
