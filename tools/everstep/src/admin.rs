//! Asks a running job, as a member of it.

use anyhow::{Context, Result, bail};
use everstep_actors::{AdminRequest, Control, RunFolder, Unit};
use everstep_transport::{Credentials, Hub, HubEvent};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

const ANSWER: Duration = Duration::from_secs(5);
/// For so long one is looked for: another may be about to lead.
const LOOK: Duration = Duration::from_secs(2);

/// The newest run folder under `runs/`.
pub(crate) fn newest_run() -> Result<RunFolder> {
    let entries = std::fs::read_dir("runs").context("no --run given, and there is no folder 'runs'")?;
    let runs = entries.flatten().map(|e| e.path()).filter(|p| p.join("job.json").exists());
    let age = |p: &PathBuf| p.join("address").metadata().and_then(|m| m.modified()).ok();
    runs.max_by_key(age).map(RunFolder).context("no --run given, and 'runs' holds no run folder")
}

pub(crate) async fn ask(run: &RunFolder, request: AdminRequest) -> Result<String> {
    let addresses = run.addresses().context("is this the folder of a run that was begun?")?;
    let credentials = Credentials::load(&run.credentials())?;
    let any = SocketAddr::new(
        if addresses.iter().all(SocketAddr::is_ipv4) { [0, 0, 0, 0].into() } else { [0u16; 8].into() },
        0,
    );
    let (hub, mut events) = Hub::open(any, &credentials, everstep_actors::new_name())?;
    let found = everstep_actors::find_supervisor(&hub, &addresses, LOOK).await;
    let peer = found.map_err(|e| anyhow::anyhow!("the job's supervisor does not answer: does it run? {e}"))?;
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
