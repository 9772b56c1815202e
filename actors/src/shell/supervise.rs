//! How a process becomes the supervisor of a run: at once if it is the only one; of several, when it leads.

use super::replicated::{Lease, Replicated, Seat};
use super::restore::{Restored, restore, restore_log};
use super::run_folder::{RunFolder, RunIdentity, open_tokens};
use super::scribe::Files;
use super::supervisor::{Args, Msg, Sink, SupervisorEnd, SupervisorProcess};
use super::{AnyError, new_name, pump};
use crate::config::Config;
use crate::tokens::Tokens;
use everstep_checkpoint::{Store, Switch};
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
    /// Makes the store of checkpoints fail (chaos).
    switch: Switch,
}

impl Ready {
    fn read(run: RunFolder, nodes: Option<usize>) -> Result<Self, AnyError> {
        let text = std::fs::read_to_string(run.config())?;
        let mut config = Config::parse(&text, &run.config().display().to_string(), &[])?;
        if nodes == Some(0) {
            return Err("--nodes 0: a job waits for one at least".into());
        }
        config.nodes = nodes.unwrap_or(config.nodes);
        let identity = RunIdentity::read(&run)?;
        let class = CpuBackend::new(config.spec.precision).class().0;
        if class != identity.class {
            let path = run.identity();
            let why = format!("the run was begun on {}, this machine is {class}: their bits differ", identity.class);
            return Err(format!("{}: {why}", path.display()).into());
        }
        let tokens = open_tokens(&run, &identity.sources)?;
        Ok(Self { run, config, identity, tokens, switch: Switch::default() })
    }

    /// Leads the job until it is over. Nodes may come once the file with `addresses` is there.
    async fn lead(
        self,
        restored: Restored,
        sink: Sink,
        (hub, mut events): (Hub, mpsc::Receiver<HubEvent>),
        addresses: &str,
    ) -> Result<SupervisorEnd, AnyError> {
        let (end, mut ended) = mpsc::channel(1);
        let Self { run, config, identity, tokens, switch } = self;
        let file = run.address();
        let args = Args { restored, sink, config, identity, run, tokens, switch, hub: hub.clone(), end };
        let (actor, handle) = Actor::spawn(None, SupervisorProcess, args).await?;
        replace(&file, |scratch| std::fs::write(scratch, addresses))?;
        let result = pump(&mut events, &actor, Msg::Hub, &mut ended).await?.unwrap_or(SupervisorEnd::Panicked);
        // The last words to the nodes need a moment to leave.
        tokio::time::sleep(Duration::from_millis(200)).await;
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
    let scratch = path.with_extension(format!("{:016x}.new", new_name()));
    make(&scratch)?;
    std::fs::rename(&scratch, path)
}

/// Runs a supervisor of a run folder until the job is over.
pub async fn run_supervisor(run: RunFolder, options: &SupervisorOptions) -> Result<SupervisorEnd, AnyError> {
    let ready = Ready::read(run, options.nodes)?;
    let credentials = Credentials::load(&ready.run.credentials())?;
    let (listen, name) = (options.listen, new_name());
    match &options.seat {
        None => alone(ready, || Hub::open(listen, &credentials, name)).await,
        Some(seat) => among(ready, seat, || Hub::open_for_calls(listen, &credentials, name)).await,
    }
}

type Endpoint = Result<(Hub, mpsc::Receiver<HubEvent>), QuicError>;

async fn alone(ready: Ready, open: impl FnOnce() -> Endpoint) -> Result<SupervisorEnd, AnyError> {
    let run = &ready.run;
    let _lock = run.lock()?;
    let (folder, config, job) = (run.clone(), ready.config.clone(), ready.identity.job.clone());
    let switch = ready.switch.clone();
    let restoring = move || -> Result<(Restored, Files), AnyError> {
        let (records, files) = restore_log(&folder)?;
        let (spec, metrics) = (config.spec.clone(), folder.metrics());
        let store = move || {
            let place = folder.store(&config, &job)?.with_switch(switch.clone());
            Store::open(place, Some(&folder.catalogue()), &job, config.keep)
        };
        Ok((restore(records, spec, &metrics, store)?, files))
    };
    let restoring = tokio::task::spawn_blocking(move || restoring().map_err(|e| e.to_string()));
    let (restored, files) = restoring.await??;
    let (hub, events) = open()?;
    let address = hub.address()?.to_string();
    let end = ready.lead(restored, Sink::Alone(files), (hub.clone(), events), &address).await;
    hub.shut_down();
    end
}

/// One of several. What goes wrong here is no end of the job: the others go on, and this process begins anew.
async fn among(ready: Ready, seat: &Seat, open: impl FnOnce() -> Endpoint) -> Result<SupervisorEnd, AnyError> {
    let folder = ready.run.seat(seat.number);
    may_begin(&ready, seat, &folder)?;
    let end = begin(ready, seat, &folder, open).await;
    Ok(end.unwrap_or_else(|error| SupervisorEnd::Deposed(error.to_string())))
}

async fn begin(
    ready: Ready,
    seat: &Seat,
    folder: &Path,
    open: impl FnOnce() -> Endpoint,
) -> Result<SupervisorEnd, AnyError> {
    std::fs::create_dir_all(folder)?;
    let _locks = ready.run.lock_seat(seat.number)?;
    let (hub, events) = open()?;
    let replicated = Replicated::start(folder, seat, &hub).await?;
    let end = follow_and_lead(ready, seat, &replicated, (hub.clone(), events)).await;
    // Whoever is deposed may have been cut off, or stopped for a while: it says nothing more.
    hub.shut_down();
    replicated.shut_down().await;
    end
}

/// Refuses what would lose or mix what a run has.
fn may_begin(ready: &Ready, seat: &Seat, folder: &Path) -> Result<(), AnyError> {
    let (run, told, wanted) = (&ready.run, seat.addresses.len() as u64, ready.config.supervisors);
    if told != wanted {
        return Err(format!("--among has {told} addresses, the run has recovery.supervisors = {wanted}").into());
    }
    if run.control_log().exists() {
        return Err(format!("{} was begun with one supervisor", run.0.display()).into());
    }
    // One that has forgotten how it voted might vote again, and make what was agreed on undone.
    if std::fs::symlink_metadata(run.metrics()).is_ok() && !folder.join("log").exists() {
        let why = "the run has begun, and this supervisor's log is gone: bring it back, or go on with the others";
        return Err(format!("{}: {why}", folder.display()).into());
    }
    Ok(())
}

async fn follow_and_lead(
    ready: Ready,
    seat: &Seat,
    replicated: &Replicated,
    (hub, mut events): (Hub, mpsc::Receiver<HubEvent>),
) -> Result<SupervisorEnd, AnyError> {
    let led = tokio::select! {
        led = replicated.lead_or_end() => led?,
        () = refuse(&mut events) => return Err("the endpoint closed".into()),
    };
    let term = match led {
        Ok(term) => term,
        Err(end) => return Ok(end.map_or_else(SupervisorEnd::Failed, |()| SupervisorEnd::Finished)),
    };
    let lease = Lease::default();
    tokio::select! {
        biased;
        why = replicated.deposed(term, lease.clone()) => Ok(SupervisorEnd::Deposed(why)),
        end = lead_among(ready, seat, replicated, (hub, events), lease) => {
            let end = end?;
            replicated.told_all().await;
            Ok(end)
        }
    }
}

async fn lead_among(
    ready: Ready,
    seat: &Seat,
    replicated: &Replicated,
    (hub, events): (Hub, mpsc::Receiver<HubEvent>),
    lease: Lease,
) -> Result<SupervisorEnd, AnyError> {
    let (folder, records) = (ready.run.seat(seat.number), replicated.records());
    let (run, config, job) = (ready.run.clone(), ready.config.clone(), ready.identity.job.clone());
    let (number, switch) = (seat.number, ready.switch.clone());
    let restoring = move || -> Result<Restored, AnyError> {
        let (spec, metrics, links) = (config.spec.clone(), folder.join("metrics.jsonl"), run.clone());
        let holds = lease.clone();
        let store = move || {
            let holds = holds.clone();
            let mine = Arc::new(move || holds.holds());
            let place = run.store(&config, &job)?.with_switch(switch.clone());
            Store::in_turn(place, Some(&folder.join("catalogue")), &job, config.keep, mine)
        };
        let restored = restore(records, spec, &metrics, store)?;
        if !lease.holds() {
            return Err("another supervisor may lead".into());
        }
        for name in ["metrics.jsonl", "events.jsonl"] {
            let target = Path::new("supervisors").join(number.to_string()).join(name);
            let link = replace(&links.0.join(name), |link| std::os::unix::fs::symlink(&target, link));
            link.map_err(|e| format!("{}: {e}", links.0.join(name).display()))?;
        }
        Ok(restored)
    };
    // Meanwhile others want signs of life.
    let restored = tokio::task::spawn_blocking(move || restoring().map_err(|e| e.to_string())).await??;
    let addresses: Vec<String> = seat.addresses.iter().map(ToString::to_string).collect();
    hub.take_sessions();
    ready.lead(restored, Sink::Replicated(replicated.clone()), (hub, events), &addresses.join(",")).await
}
