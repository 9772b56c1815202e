//! How a process becomes the supervisor of a run: at once if it is the only one; of several, when it leads.

use super::replicated::{Lease, Replicated, Seat};
use super::restore::{Restored, restore, restore_log};
use super::run_folder::{RunFolder, RunIdentity, open_tokens};
use super::supervisor::{Args, Msg, Sink, SupervisorEnd, SupervisorProcess};
use super::{AnyError, new_name, pump};
use crate::config::Config;
use crate::tokens::Tokens;
use everstep_checkpoint::Store;
use everstep_kernels::{Backend, CpuBackend};
use everstep_transport::{Credentials, Hub, HubEvent, QuicError};
use ractor::Actor;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// How to be a supervisor.
#[derive(Debug, Clone)]
pub struct SupervisorOptions {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Nodes that the job waits for, if not as many as the configuration says.
    pub nodes: Option<usize>,
    /// Which of several it is, if there are several.
    pub seat: Option<Seat>,
}

/// What a supervisor of a run needs to begin, checked.
struct Ready {
    run: RunFolder,
    config: Config,
    identity: RunIdentity,
    tokens: Vec<Tokens>,
}

impl Ready {
    fn read(run: RunFolder, nodes: Option<usize>) -> Result<Self, AnyError> {
        let text = std::fs::read_to_string(run.config())?;
        let mut config = Config::parse(&text, &run.config().display().to_string(), &[])?;
        config.nodes = nodes.unwrap_or(config.nodes);
        let identity = RunIdentity::read(&run)?;
        let class = CpuBackend::new(config.spec.precision).class().0;
        if class != identity.class {
            let path = run.identity();
            let why = format!("the run was begun on {}, this machine is {class}: their bits differ", identity.class);
            return Err(format!("{}: {why}", path.display()).into());
        }
        let tokens = open_tokens(&run, &identity.sources)?;
        Ok(Self { run, config, identity, tokens })
    }

    /// Leads the job until it is over, or `deposed` says that another may. Nodes may come once the file with `addresses`
    /// is there.
    async fn lead(
        self,
        restored: Restored,
        sink: Sink,
        (hub, mut events): (Hub, mpsc::Receiver<HubEvent>),
        addresses: &str,
        deposed: impl Future<Output = String>,
    ) -> Result<SupervisorEnd, AnyError> {
        let (end, mut ended) = mpsc::channel(1);
        let Self { run, config, identity, tokens } = self;
        let file = run.address();
        let args = Args { restored, sink, config, identity, run, tokens, hub: hub.clone(), end };
        let (actor, handle) = Actor::spawn(None, SupervisorProcess, args).await?;
        replace(&file, |scratch| std::fs::write(scratch, addresses))?;
        let result = tokio::select! {
            result = pump(&mut events, &actor, Msg::Hub, &mut ended) => result?.unwrap_or(SupervisorEnd::Panicked),
            why = deposed => SupervisorEnd::Deposed(why),
        };
        if !matches!(result, SupervisorEnd::Deposed(_)) {
            // The last words, to nodes and to other supervisors, need a moment to leave.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        actor.stop(None);
        let _ = handle.await;
        Ok(result)
    }
}

/// What the hub tells while there are no sessions: who was refused. Returns when it tells no more.
async fn refuse(events: &mut mpsc::Receiver<HubEvent>) {
    while let Some(event) = events.recv().await {
        tracing::warn!(?event, "before this supervisor leads");
    }
}

/// Puts something in the place of a file in one step.
fn replace(path: &Path, make: impl FnOnce(&Path) -> std::io::Result<()>) -> std::io::Result<()> {
    let scratch = path.with_extension(format!("{}.new", std::process::id()));
    match std::fs::remove_file(&scratch) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    make(&scratch)?;
    std::fs::rename(&scratch, path)
}

/// Runs a supervisor of a run folder until the job is over.
pub async fn run_supervisor(run: RunFolder, options: &SupervisorOptions) -> Result<SupervisorEnd, AnyError> {
    let ready = Ready::read(run, options.nodes)?;
    let credentials = Credentials::load(&ready.run.credentials())?;
    let open = || Hub::open(options.listen, &credentials, new_name());
    match &options.seat {
        None => alone(ready, open).await,
        Some(seat) => among(ready, seat, open).await,
    }
}

type Opened = Result<(Hub, mpsc::Receiver<HubEvent>), QuicError>;

async fn alone(ready: Ready, open: impl FnOnce() -> Opened) -> Result<SupervisorEnd, AnyError> {
    let run = &ready.run;
    let _lock = run.lock()?;
    let (records, files) = restore_log(run)?;
    let store = Store::open(&run.checkpoints(), &ready.identity.job, ready.config.keep)?;
    let restored = restore(store, &ready.config, records, &run.metrics())?;
    let (hub, events) = open()?;
    let address = hub.address()?.to_string();
    let never = std::future::pending();
    let end = ready.lead(restored, Sink::Alone(files), (hub.clone(), events), &address, never).await;
    hub.shut_down();
    end
}

async fn among(ready: Ready, seat: &Seat, open: impl FnOnce() -> Opened) -> Result<SupervisorEnd, AnyError> {
    let run = ready.run.clone();
    let folder = run.seat(seat.number);
    std::fs::create_dir_all(&folder)?;
    let _locks = run.lock_seat(seat.number)?;
    let (hub, mut events) = open()?;
    hub.take_sessions(false);
    let replicated = Replicated::start(&folder, seat, &hub).await?;
    let led = tokio::select! {
        led = replicated.lead_or_end() => led?,
        () = refuse(&mut events) => return Err("the endpoint closed".into()),
    };
    let end = match led {
        Err(end) => end.map_or_else(SupervisorEnd::Failed, |()| SupervisorEnd::Finished),
        Ok(term) => {
            let lease = Lease::default();
            let holds = lease.clone();
            let (job, keep) = (&ready.identity.job, ready.config.keep);
            let mine = Arc::new(move || holds.holds());
            let store = Store::in_turn(&run.checkpoints(), &folder.join("catalogue"), job, keep, mine)?;
            let restored = restore(store, &ready.config, replicated.records(), &folder.join("metrics.jsonl"))?;
            for name in ["metrics.jsonl", "events.jsonl"] {
                let target = Path::new("supervisors").join(seat.number.to_string()).join(name);
                replace(&run.0.join(name), |link| std::os::unix::fs::symlink(&target, link))?;
            }
            let addresses: Vec<String> = seat.addresses.iter().map(ToString::to_string).collect();
            hub.take_sessions(true);
            let (sink, deposed) = (Sink::Replicated(replicated.clone()), replicated.deposed(term, lease));
            ready.lead(restored, sink, (hub.clone(), events), &addresses.join(","), deposed).await?
        }
    };
    // Whoever is deposed may have been cut off, or stopped for a while: it says nothing more.
    hub.shut_down();
    replicated.shut_down().await;
    Ok(end)
}
