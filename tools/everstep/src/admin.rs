//! Asks a running job, as a member of it.

use anyhow::{Context, Result, bail};
use everstep_actors::{AdminRequest, Control, RunFolder, Unit};
use everstep_transport::{Credentials, Hub, HubEvent};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

const ANSWER: Duration = Duration::from_secs(5);

/// The newest run folder under `runs/`.
pub(crate) fn newest_run() -> Result<RunFolder> {
    let entries = std::fs::read_dir("runs").context("no --run given, and there is no folder 'runs'")?;
    let runs = entries.flatten().map(|e| e.path()).filter(|p| p.join("job.json").exists());
    let age = |p: &PathBuf| p.join("address").metadata().and_then(|m| m.modified()).ok();
    runs.max_by_key(age).map(RunFolder).context("no --run given, and 'runs' holds no run folder")
}

pub(crate) async fn ask(run: &RunFolder, request: AdminRequest) -> Result<String> {
    let path = run.address();
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: is this a run folder?", path.display()))?;
    let address: SocketAddr = text.trim().parse().with_context(|| format!("{} holds no address", path.display()))?;
    let credentials = Credentials::load(&run.credentials())?;
    let any = SocketAddr::new(if address.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() }, 0);
    let (hub, mut events) = Hub::open(any, &credentials, everstep_actors::new_name())?;
    let peer = hub.dial(address).await.context("the job's supervisor does not answer: does it run?")?;
    let unit = Unit::Control(Control::Admin { ticket: 1, request });
    hub.send(peer, unit.lane(), unit.encode());
    let answer = tokio::time::timeout(ANSWER, async {
        while let Some(event) = events.recv().await {
            if let HubEvent::Message(_, message) = event
                && let Unit::Control(Control::Described { text, .. }) = Unit::decode(message)?
            {
                return Ok(text);
            }
        }
        bail!("the connection closed")
    });
    let text = answer.await.with_context(|| format!("no answer within {} s", ANSWER.as_secs()))?;
    hub.shut_down();
    text
}
