//! What operators ask of the supervisor's process.

use super::supervisor::State;
use super::{clock, machine, tell};
use crate::control::{ActorRequest, AdminRequest, Control, Disturbed};
use crate::ids::{ActorId, NodeId};
use crate::supervisor::SupervisorEvent;
use everstep_transport::Peer;
use std::fmt::Write;
use std::time::Duration;

/// Questions that wait for a node's answer; older ones are given up.
const OPERATORS_MAX: usize = 256;

impl State {
    pub(super) fn on_admin(&mut self, operator: Peer, ticket: u64, request: AdminRequest) {
        let asked = match request {
            AdminRequest::Links(node) => return self.on_links(operator, ticket, node),
            AdminRequest::Tree => Err(self.tree()),
            AdminRequest::Inspect(ActorId::Supervisor) => Err(self.inspect()),
            AdminRequest::Drain(node) => {
                let text = self.root.supervisor.parting(node);
                self.supervise(SupervisorEvent::Leave(node));
                Err(text)
            }
            AdminRequest::Disturb(what, ms) => Err(self.disturb(what, ms)),
            AdminRequest::Inspect(actor) => Ok((actor, ActorRequest::Describe)),
            AdminRequest::Kill(actor) => Ok((actor, ActorRequest::Panic)),
            AdminRequest::Flip(actor) => Ok((actor, ActorRequest::Flip)),
        };
        // What nodes need not be asked is answered at once.
        let asked = asked.and_then(|(actor, request)| {
            let table = self.root.supervisor.table();
            let target = table.address(actor).zip(table.node_of(actor));
            let found = target.and_then(|(address, node)| Some((address, self.peer_of(node)?, request)));
            found.ok_or_else(|| format!("{actor} has no place on a node"))
        });
        let (address, peer, request) = match asked {
            Ok(asked) => asked,
            Err(text) => return tell(&self.hub, operator, Control::Described { ticket, text }),
        };
        let ticket = self.remember(operator, ticket);
        tell(&self.hub, peer, Control::Actor { address, request, ticket });
    }

    /// Remembers who asked until a node has answered; gives the ticket for the node.
    fn remember(&mut self, operator: Peer, ticket: u64) -> u64 {
        self.next_ticket += 1;
        self.operators.insert(self.next_ticket, (operator, ticket));
        if self.operators.len() > OPERATORS_MAX {
            self.operators.pop_first();
        }
        self.next_ticket
    }

    fn on_links(&mut self, operator: Peer, ticket: u64, node: NodeId) {
        let Some(peer) = self.peer_of(node) else {
            return tell(&self.hub, operator, Control::Described { ticket, text: format!("{node} is not there") });
        };
        let ticket = self.remember(operator, ticket);
        tell(&self.hub, peer, Control::Links { ticket });
    }

    fn inspect(&self) -> String {
        let store = self.store_fails.as_ref().map_or(String::new(), |why| format!("; checkpoints wait: {why}"));
        format!("{}; {} messages refused{store}", self.root.supervisor.describe(), self.root.router().refused())
    }

    /// Makes something go wrong for a while (chaos). Gives what to tell.
    fn disturb(&mut self, what: Disturbed, ms: u32) -> String {
        let lasts = Duration::from_millis(ms.into());
        match what {
            Disturbed::Wire(node, bad) => {
                let nodes = &self.root.supervisor.table().nodes;
                if let Some(gone) = [Some(node), bad.with].into_iter().flatten().find(|node| !nodes.contains_key(node))
                {
                    return format!("{gone} is not in the job");
                }
                let Some(peer) = self.peer_of(node) else { return format!("{node} is not in the job") };
                tell(&self.hub, peer, Control::Disturb(bad, ms));
            }
            Disturbed::Store(trouble) => self.switch.set(trouble, lasts),
            Disturbed::Clock(by) => clock::step(by, lasts),
        }
        format!("{what:?} for {ms} ms")
    }

    fn tree(&self) -> String {
        let (table, machine) = (self.root.supervisor.table(), machine());
        // Numbers of processes say something only on the machine that they are of.
        let process = |pid: u32, of: &str| {
            if of.is_empty() || of != machine { String::new() } else { format!(", process {pid}") }
        };
        let me = process(std::process::id(), &machine);
        let mut text = format!("supervisor on machine '{machine}'{me}: {}\n", self.root.supervisor.describe());
        for (node, info) in &table.nodes {
            let leaving = if table.leaving.contains(node) { ", leaving" } else { "" };
            let process = process(info.pid, &info.machine);
            let _ = writeln!(text, "{node} at {}{process}{leaving}", info.address);
            for address in table.actors_of(*node) {
                let primary = match address.actor {
                    ActorId::Reducer { shard, .. } if table.primary(shard) == Some(address.actor) => "  primary",
                    _ => "",
                };
                let _ = writeln!(text, "  {address}{primary}");
            }
        }
        text
    }
}
