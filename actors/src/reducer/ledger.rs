//! The ledger of a step: who has contributed what to a shard (contract C3).
//!
//! - LE-1: each expected sender is counted once for each group, with all micro-batches, or not at all.
//! - LE-2: it balances exactly when no expected sum is missing; then every group counts every sample
//!   of the step once.

use crate::ids::{ActorId, Step};
use crate::plant::{Bug, planted};
use crate::spec::JobSpec;
use everstep_kernels::{Group, Tensor};
use std::collections::BTreeMap;

/// One sender's sum of one group.
#[derive(Debug, Clone)]
pub struct Receipt {
    /// Micro-batches in it.
    pub micro_batches: u32,
    /// Samples in it.
    pub samples: u64,
    /// Gradients by parameter and use.
    pub gradients: Vec<Tensor>,
    /// Rows by expert.
    pub loads: Vec<u64>,
    /// Sums of losses.
    pub losses: [f64; 2],
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    micro_batches: u32,
    /// Receipts by group and sender, in order of sender; `None` while one is missing.
    expected: BTreeMap<Group, BTreeMap<ActorId, Option<Receipt>>>,
    /// In order of arrival, for the planted bugs.
    arrivals: BTreeMap<Group, Vec<(ActorId, Receipt)>>,
}

impl Ledger {
    /// An empty ledger of a shard's groups.
    pub fn new(spec: &JobSpec, step: Step, groups: &[Group]) -> Self {
        let senders = |g: &Group| spec.senders_of(*g).into_iter().map(|s| (s, None)).collect();
        let expected = groups.iter().map(|g| (*g, senders(g))).collect();
        Self { micro_batches: spec.micro_batches.at(step), expected, arrivals: BTreeMap::new() }
    }

    /// Counts a sum. Foreign senders, incomplete sums and second copies are not counted.
    pub fn credit(&mut self, sender: ActorId, group: Group, receipt: Receipt) {
        if receipt.micro_batches != self.micro_batches {
            return;
        }
        let Some(place) = self.expected.get_mut(&group).and_then(|of| of.get_mut(&sender)) else { return };
        if place.is_some() && !planted(Bug::ContributionTwice) {
            return;
        }
        if planted(Bug::ContributionTwice) || planted(Bug::ArrivalOrderSum) {
            self.arrivals.entry(group).or_default().push((sender, receipt.clone()));
        }
        *place = Some(receipt);
    }

    /// Sums that are missing.
    pub fn missing(&self) -> usize {
        self.expected.values().flat_map(BTreeMap::values).filter(|r| r.is_none()).count()
    }

    /// Whether none is.
    pub fn balanced(&self) -> bool {
        self.missing() == 0
    }

    /// The sums were taken to be added, and are not wanted again: who has contributed stays known.
    pub fn spend(&mut self) {
        let receipts = self.expected.values_mut().flat_map(BTreeMap::values_mut).flatten();
        receipts.for_each(|receipt| receipt.gradients = Vec::new());
        self.arrivals.clear();
    }

    /// A group's receipts in order of sender.
    pub fn receipts(&self, group: Group) -> Vec<(ActorId, Receipt)> {
        if planted(Bug::ArrivalOrderSum) {
            return self.arrivals[&group].clone();
        }
        if planted(Bug::ContributionTwice) {
            let mut all = self.arrivals[&group].clone();
            all.sort_by_key(|(sender, _)| *sender);
            return all;
        }
        self.expected[&group].iter().filter_map(|(sender, r)| Some((*sender, r.clone()?))).collect()
    }
}
