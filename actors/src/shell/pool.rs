//! Threads for jobs, so that nothing heavy runs on a runtime's thread.
//!
//! Rows that are made again have a thread of their own: somebody's next life waits for them, and they are little more than
//! copied.
//!
//! A thread that is paced takes at least the planned time for a job, so that several nodes on one machine behave like as
//! many machines of that speed.
//!
//! Bound: an actor has one job at a time, or two when a commit overtakes a life that replays the step; a stage beside that two for
//! each micro-batch whose rows it makes again, in each epoch that gave experts new lives; a host at most one for each
//! micro-batch that a lane has in flight, and as many for its stage's next life.

use crate::compute::{Job, Outcome, attempt};
use crate::hang::At;
use crate::rates::{KINDS, Rates, kind};
use crate::tally::{Operations, is_recipe};
use everstep_kernels::Backend;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Jobs that may wait.
const QUEUE: usize = 65_536;

/// What becomes of a job: its outcome, or the words of a panic.
type Reply = Box<dyn FnOnce(Result<Outcome, String>) + Send>;

struct Task {
    job: Job,
    cost: u64,
    reply: Reply,
}

/// See the module. The threads end with the last handle.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    /// Its places are there from the beginning: small ones.
    queue: SyncSender<Box<Task>>,
    /// The same, of rows.
    rows: SyncSender<Box<Task>>,
    done: Arc<Done>,
    /// As in [`Rates`].
    rates: Arc<[[AtomicU64; 2]; KINDS]>,
    /// Of each thread: the number of the job that it is at, 0 for none, and its multiply-adds.
    at: Arc<Vec<[AtomicU64; 2]>>,
}

/// Multiply-adds, as in [`Operations`].
#[derive(Debug, Default)]
struct Done {
    work: AtomicU64,
    redone: AtomicU64,
    recipes: AtomicU64,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Task({:?})", self.job)
    }
}

impl Pool {
    /// `pace`: multiply-adds a second of each thread.
    pub(super) fn new(threads: usize, backend: &Arc<dyn Backend>, pace: Option<f64>) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let ((queue, tasks), (rows, of_rows)) = (sync_channel(QUEUE), sync_channel(QUEUE));
        let [tasks, of_rows] = [tasks, of_rows].map(|tasks| Arc::new(Mutex::new(tasks)));
        let done: Arc<Done> = Arc::default();
        let at: Arc<Vec<[AtomicU64; 2]>> = Arc::new((0..=threads).map(|_| Default::default()).collect());
        let rates: Arc<[[AtomicU64; 2]; KINDS]> = Arc::default();
        let spawn = |n: usize, name: String, tasks: &Arc<Mutex<Receiver<Box<Task>>>>, pace: Option<f64>| {
            let (tasks, backend, done) = (Arc::clone(tasks), Arc::clone(backend), Arc::clone(&done));
            let (at, rates) = (Arc::clone(&at), Arc::clone(&rates));
            let serve = move || serve(&tasks, &*backend, (&done, &rates), &at[n], pace);
            std::thread::Builder::new().name(name).spawn(serve)
        };
        for n in 0..threads {
            spawn(n, format!("compute-{n}"), &tasks, pace)?;
        }
        spawn(threads, "rows".to_owned(), &of_rows, None)?;
        Ok(Self { queue, rows, done, rates, at })
    }

    /// Multiply-adds done so far.
    pub(super) fn operations(&self) -> Operations {
        let [work, redone, recipes] =
            [&self.done.work, &self.done.redone, &self.done.recipes].map(|n| n.load(Ordering::Relaxed));
        Operations { work, redone, recipes }
    }

    /// How long what was done took.
    pub(super) fn rates(&self) -> Rates {
        Rates(std::array::from_fn(|kind| self.rates[kind].each_ref().map(|n| n.load(Ordering::Relaxed))))
    }

    /// What each thread is at.
    pub(super) fn at(&self) -> impl Iterator<Item = At> {
        // A cost that is one job's too old is seen for one look at most.
        self.at.iter().map(|[job, cost]| At { job: job.load(Ordering::Relaxed), cost: cost.load(Ordering::Relaxed) })
    }

    /// A job that is submitted is done again.
    pub(super) fn again(&self, cost: u64) {
        self.done.redone.fetch_add(cost, Ordering::Relaxed);
    }

    /// Runs a job; `reply` is called on the job's thread.
    pub(super) fn submit(&self, job: Job, cost: u64, reply: impl FnOnce(Result<Outcome, String>) + Send + 'static) {
        let queue = if matches!(job, Job::Rows(_)) { &self.rows } else { &self.queue };
        let task = Box::new(Task { job, cost, reply: Box::new(reply) });
        if let Err(TrySendError::Full(task) | TrySendError::Disconnected(task)) = queue.try_send(task) {
            (task.reply)(Err("there is no room for its job".to_owned()));
        }
    }
}

fn serve(
    tasks: &Mutex<Receiver<Box<Task>>>,
    backend: &dyn Backend,
    (done, rates): (&Done, &[[AtomicU64; 2]; KINDS]),
    [at, costs]: &[AtomicU64; 2],
    pace: Option<f64>,
) {
    for number in 1.. {
        let next = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = next else { return };
        let Task { job, cost, reply } = *task;
        let (began, kind, recipe) = (Instant::now(), kind(&job), is_recipe(&job));
        costs.store(kind.map_or(0, |_| cost), Ordering::Relaxed);
        at.store(number, Ordering::Relaxed);
        let result = attempt(job, backend);
        // What follows is no hang.
        at.store(0, Ordering::Relaxed);
        if let Some(pace) = pace {
            std::thread::sleep(Duration::from_secs_f64(cost as f64 / pace).saturating_sub(began.elapsed()));
        }
        let counter = if recipe { &done.recipes } else { &done.work };
        counter.fetch_add(cost, Ordering::Relaxed);
        if let Some(kind) = kind {
            rates[kind][0].fetch_add(cost, Ordering::Relaxed);
            rates[kind][1].fetch_add(began.elapsed().as_micros() as u64, Ordering::Relaxed);
        }
        reply(result);
    }
}
