//! What a reducer computes: sums over the lanes, the shard's part of the norm, the optimizer step.

use super::Ledger;
use super::ledger::Receipt;
use crate::ids::{ActorId, Step};
use crate::message::{Commit, Corruption, ParameterState};
use crate::spec::{JobSpec, Layout, OptimizerSpec};
use everstep_kernels::{
    AdamW, Group, Parameter, Tensor, Update, Words, adamw_step, add_to, averaged, power, square_sums, state_sum, sum,
};
use std::sync::Arc;

/// Weight and moments of one parameter, and the average of the weight if the job keeps one.
#[derive(Debug, Clone)]
pub struct ParameterData(ParameterState<Tensor>);

impl ParameterData {
    /// From the tensors of a message; none if they are not matrices of the parameter's shape, stored as `parts` says.
    pub fn from_tensors(tensors: &[Tensor], parameter: &Parameter, parts: &[Words]) -> Option<Self> {
        let shape = (parameter.rows, parameter.columns);
        let given = tensors.iter().map(|t| t.stored_as().filter(|_| (t.rows(), t.columns()) == shape));
        given.eq(parts.iter().map(|stored| Some(*stored))).then(|| Self(tensors.to_vec()))
    }

    /// As tensors that share the data.
    pub fn tensors(&self) -> ParameterState<Tensor> {
        self.0.clone()
    }

    /// The weight alone: a handle of its own, for what is made of it goes with the step.
    pub fn weight(&self) -> Tensor {
        let weight = self.0[0].as_host().expect("a weight is f32 in host memory");
        Tensor::host(self.0[0].rows(), self.0[0].columns(), Arc::clone(weight))
    }

    /// Flips a bit of the weight (chaos).
    pub fn flip(&mut self) {
        self.0[0] = crate::audit::wrong(&self.0[0]);
    }

    /// Fingerprint sum.
    pub fn sum(&self) -> u128 {
        state_sum(&self.0)
    }
}

/// A shard's state from the tensors of a message, by number; none if they are not what its layout says.
pub(crate) fn states(
    tensors: &[ParameterState<Tensor>],
    numbers: &[u32],
    spec: &JobSpec,
    layout: &Layout,
) -> Option<Vec<ParameterData>> {
    let parts = spec.parts();
    let of = |(n, tensors): (&u32, &ParameterState<Tensor>)| {
        ParameterData::from_tensors(tensors, &layout.parameters[*n as usize], &parts)
    };
    (tensors.len() == numbers.len()).then(|| numbers.iter().zip(tensors).map(of).collect())?
}

/// Whether a sender's sums of a group are what the layout says: f32 gradients of each use of its parameters, and as many
/// loads as experts that are balanced.
pub(super) fn fits(receipt: &Receipt, sender: ActorId, group: Group, spec: &JobSpec, layout: &Layout) -> bool {
    let (with, without): (Vec<u32>, Vec<u32>) = layout.of_group[&group].iter().partition(|n| layout.has_gradient(**n));
    let parameter = |n: &u32| &layout.parameters[*n as usize];
    let expected = with.iter().map(parameter).flat_map(|p| spec.uses(p, sender).iter().map(|_| (p.rows, p.columns)));
    let given = receipt.gradients.iter().map(|t| t.as_host().map(|_| (t.rows(), t.columns())));
    given.eq(expected.map(Some)) && receipt.loads.len() == without.iter().map(|n| parameter(n).len()).sum::<usize>()
}

/// The state that training begins with from a parameter's weight: moments of zero and, if the job keeps one, the weight as
/// its average. Panics on a weight of another size.
pub fn first_state(spec: &JobSpec, parameter: &Parameter, weight: Vec<f32>) -> Vec<Tensor> {
    let (rows, columns) = (parameter.rows, parameter.columns);
    let weight = Arc::new(weight);
    let part = |(at, stored): (usize, Words)| match at {
        0 | OptimizerSpec::AVERAGE => Tensor::host(rows, columns, Arc::clone(&weight)),
        _ => Tensor::zeros(rows, columns, stored),
    };
    spec.parts().into_iter().enumerate().map(part).collect()
}

/// The state before the first step.
pub(crate) fn initial(spec: &JobSpec, parameters: &[Parameter]) -> Applied {
    let weight = |p: &Parameter| p.initial(spec.seed, spec.model.initial_std);
    let parameters: Vec<ParameterData> =
        parameters.iter().map(|p| ParameterData(first_state(spec, p, weight(p)))).collect();
    let sums = parameters.iter().map(ParameterData::sum).collect();
    Applied { step: 0, parameters, sums }
}

/// The state after a step, shared with snapshots and copies: never changed in place while it is.
#[derive(Debug, Clone)]
pub struct State {
    /// The committed step.
    pub step: Step,
    /// In order of the shard's parameters.
    pub parameters: Vec<ParameterData>,
    /// Number and fingerprint sum of each, as it was made.
    pub sums: Vec<(u32, u128)>,
}

impl State {
    /// Whether it is what it was when it was made.
    pub fn check(&self) -> Result<(), Corruption> {
        let mut all = self.parameters.iter().zip(&self.sums);
        all.try_for_each(|(p, (number, made))| unchanged(self.step, *number, [*made, p.sum()]))
    }
}

fn unchanged(step: Step, parameter: u32, hashes: [u128; 2]) -> Result<(), Corruption> {
    if hashes[0] == hashes[1] { Ok(()) } else { Err(Corruption { step, parameter, hashes }) }
}

/// Adds the sums of all senders of each group.
#[derive(Debug)]
pub struct Reduce {
    step: Step,
    groups: Vec<GroupSums>,
    head: Option<usize>,
    /// Whether there are other copies, which must have the same sums.
    compared: bool,
}

/// Where the sums of one use are: by lane, the receipt and the place in it.
type Use = Vec<(usize, usize)>;

/// What came for one group.
#[derive(Debug)]
struct GroupSums {
    /// By sender, in order.
    receipts: Vec<Receipt>,
    /// Numbers of the parameters with a gradient; for each use the receipts that have a sum of it, and
    /// where in them. A use without receipts isn't listed.
    parameters: Vec<(u32, Vec<Use>)>,
}

impl GroupSums {
    fn new(receipts: Vec<(ActorId, Receipt)>, numbers: &[u32], spec: &JobSpec, layout: &Layout) -> Self {
        let mut at = vec![0; receipts.len()];
        let mut parameters = Vec::new();
        for number in numbers {
            let parameter = &layout.parameters[*number as usize];
            let mut uses: [Use; 2] = Default::default();
            for (r, (sender, _)) in receipts.iter().enumerate() {
                for n in spec.uses(parameter, *sender) {
                    uses[*n].push((r, at[r]));
                    at[r] += 1;
                }
            }
            parameters.push((*number, uses.into_iter().filter(|u| !u.is_empty()).collect()));
        }
        Self { receipts: receipts.into_iter().map(|(_, r)| r).collect(), parameters }
    }

    /// A parameter's gradient: lanes added for each use, uses added last (DESIGN 3.1).
    fn gradient(&self, uses: &[Use]) -> Arc<Vec<f32>> {
        let of_use = |parts: &Use| {
            let host = |(r, at): &(usize, usize)| {
                Arc::clone(self.receipts[*r].gradients[*at].as_host().expect("the ledger counts f32 sums only"))
            };
            tree(&parts.iter().map(host).collect::<Vec<_>>(), &add_vectors)
        };
        uses.iter().map(of_use).reduce(add_vectors).expect("a parameter with a gradient is used")
    }

    /// Samples that were counted: the same in each use, or a number that no step has.
    fn samples(&self) -> u64 {
        let of_use = |parts: &Use| parts.iter().map(|(r, _)| self.receipts[*r].samples).sum::<u64>();
        same(self.parameters.iter().flat_map(|(_, uses)| uses.iter().map(of_use)))
    }
}

/// What all counts are, if they are equal; else a number that no step has: the supervisor refuses it.
fn same(counts: impl Iterator<Item = u64>) -> u64 {
    counts.reduce(|a, b| if a == b { a } else { u64::MAX }).unwrap_or(0)
}

/// A step's gradients over all lanes.
#[derive(Debug)]
pub struct Reduced {
    /// The step.
    pub step: Step,
    /// Gradients by number of the parameter.
    pub gradients: Vec<(u32, Arc<Vec<f32>>)>,
    /// Rows by expert, with the groups in the shard's order.
    pub loads: Vec<Vec<u64>>,
    /// Squared sums of chunks by number.
    pub norm: Vec<(u32, Vec<f64>)>,
    /// Sums of the losses, if the shard has the head.
    pub losses: Option<[f64; 2]>,
    /// Samples that each group counted.
    pub samples: u64,
    /// Hash of gradients and loads, if they are compared.
    pub digest: Option<u128>,
}

/// Adds `parts` as a binary tree that splits at the largest power of two below their number (DESIGN 3.1).
fn tree<T>(parts: &[T], add: &impl Fn(T, T) -> T) -> T
where
    T: Clone,
{
    match parts {
        [] => unreachable!("a balanced ledger has a receipt of every sender"),
        [only] => only.clone(),
        _ => {
            let cut = parts.len().next_power_of_two() / 2;
            add(tree(&parts[..cut], add), tree(&parts[cut..], add))
        }
    }
}

fn add_vectors(a: Arc<Vec<f32>>, b: Arc<Vec<f32>>) -> Arc<Vec<f32>> {
    // A sum that nobody else has is added to in place.
    match Arc::try_unwrap(a) {
        Ok(mut a) => {
            add_to(&mut a, &b);
            Arc::new(a)
        }
        Err(a) => Arc::new(sum(&a, &b)),
    }
}

impl Reduce {
    /// The step whose sums it adds.
    pub(crate) fn step(&self) -> Step {
        self.step
    }

    /// Of a balanced ledger.
    pub fn new(step: Step, ledger: &Ledger, spec: &JobSpec, layout: &Layout, groups: &[Group]) -> Self {
        let sums = |g: &Group| {
            let numbers: Vec<u32> = layout.of_group[g].iter().copied().filter(|n| layout.has_gradient(*n)).collect();
            GroupSums::new(ledger.receipts(*g), &numbers, spec, layout)
        };
        let head = groups.iter().position(|g| *g == Group::Head);
        Self { step, groups: groups.iter().map(sums).collect(), head, compared: spec.mirrors > 0 }
    }

    /// Does it.
    pub fn run(self) -> Reduced {
        let (mut gradients, mut loads, mut norm) = (Vec::new(), Vec::new(), Vec::new());
        for group in &self.groups {
            for (number, uses) in &group.parameters {
                let sum = group.gradient(uses);
                norm.push((*number, square_sums(&sum)));
                gradients.push((*number, sum));
            }
            let parts: Vec<Vec<u64>> = group.receipts.iter().map(|r| r.loads.clone()).collect();
            loads.push(tree(&parts, &|a: Vec<u64>, b| a.iter().zip(b).map(|(a, b)| a + b).collect()));
        }
        let losses = self.head.map(|h| {
            let losses: Vec<[f64; 2]> = self.groups[h].receipts.iter().map(|r| r.losses).collect();
            tree(&losses, &|a, b| [a[0] + b[0], a[1] + b[1]])
        });
        let samples = same(self.groups.iter().map(GroupSums::samples));
        let digest = self.compared.then(|| digest(&gradients, &loads));
        Reduced { step: self.step, gradients, loads, norm, losses, samples, digest }
    }
}

/// A hash of sums in which every bit counts: the norm beside it, of squares, does not see a sign.
fn digest(gradients: &[(u32, Arc<Vec<f32>>)], loads: &[Vec<u64>]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    for (number, gradient) in gradients {
        hasher.update(&number.to_le_bytes());
        hasher.update(bytemuck::cast_slice(gradient));
    }
    for load in loads.iter().flatten() {
        hasher.update(&load.to_le_bytes());
    }
    let hash = hasher.finalize();
    u128::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash of 32 bytes"))
}

/// What an optimizer step changes one parameter with.
#[derive(Debug)]
struct ParameterWork {
    data: ParameterData,
    /// Its number and fingerprint sum.
    made: (u32, u128),
    gradient: Option<Arc<Vec<f32>>>,
    /// Rows by expert, for a gate's bias.
    loads: Vec<u64>,
    update: Update,
}

/// An optimizer step over a shard.
#[derive(Debug)]
pub struct Apply {
    commit: Commit,
    adamw: AdamW,
    decay: f32,
    bias_step: f32,
    work: Vec<ParameterWork>,
}

/// A state and its fingerprint sums.
#[derive(Debug)]
pub struct Applied {
    /// The committed step.
    pub step: Step,
    /// In order of the shard's parameters.
    pub parameters: Vec<ParameterData>,
    /// The same.
    pub sums: Vec<u128>,
}

impl Apply {
    /// Of a committed step's sums.
    pub fn new(spec: &JobSpec, layout: &Layout, state: &State, reduced: Reduced, commit: Commit) -> Self {
        let o = &spec.optimizer;
        let adamw = AdamW {
            lr: commit.lr,
            beta1: o.beta1 as f32,
            beta2: o.beta2 as f32,
            eps: o.eps as f32,
            decay: 0.0,
            clip: commit.clip,
            correction1: (1.0 / (1.0 - power(o.beta1, commit.step))) as f32,
            correction2: (1.0 / (1.0 - power(o.beta2, commit.step))) as f32,
            ema: o.ema.map(|keep| keep as f32),
        };
        let mut gradients: std::collections::BTreeMap<u32, Arc<Vec<f32>>> = reduced.gradients.into_iter().collect();
        let loads: std::collections::BTreeMap<Group, Vec<u64>> = {
            let mut groups: Vec<Group> = state.sums.iter().map(|(n, _)| layout.parameters[*n as usize].group).collect();
            groups.dedup();
            groups.into_iter().zip(reduced.loads).collect()
        };
        let work = |(data, made): (&ParameterData, &(u32, u128))| {
            let p = &layout.parameters[made.0 as usize];
            let loads = loads.get(&p.group).cloned().unwrap_or_default();
            ParameterWork {
                data: data.clone(),
                made: *made,
                gradient: gradients.remove(&made.0),
                loads,
                update: p.update,
            }
        };
        let work = state.parameters.iter().zip(&state.sums).map(work).collect();
        Self { commit, adamw, decay: o.weight_decay as f32, bias_step: o.bias_step.at(commit.step), work }
    }

    /// Does it, unless the state is not what it was when it was made.
    pub fn run(self) -> Result<Applied, Corruption> {
        let (mut parameters, mut sums) = (Vec::new(), Vec::new());
        for ParameterWork { data: mut p, made, gradient, loads, update } in self.work {
            let [read, sum] = if self.commit.skipped {
                [p.sum(); 2]
            } else {
                match (update, gradient) {
                    (Update::Balance, _) => {
                        let read = p.sum();
                        balance(&mut p, &loads, self.bias_step, self.adamw.ema);
                        [read, p.sum()]
                    }
                    (Update::Decayed | Update::Plain, Some(gradient)) => {
                        let decay = if update == Update::Decayed { self.decay } else { 0.0 };
                        // Not in place: the state before may be on its way to a snapshot or a copy.
                        let (stepped, sums) = adamw_step(&p.0, &gradient, &AdamW { decay, ..self.adamw });
                        p = ParameterData(stepped);
                        sums
                    }
                    (Update::Decayed | Update::Plain, None) => {
                        unreachable!("a balanced ledger has a gradient of every parameter")
                    }
                }
            };
            unchanged(self.commit.step - 1, made.0, [made.1, read])?;
            parameters.push(p);
            sums.push(sum);
        }
        Ok(Applied { step: self.commit.step, parameters, sums })
    }
}

/// A step of a gate's bias and, if it is kept, its average.
fn balance(p: &mut ParameterData, loads: &[u64], by: f32, ema: Option<f32>) {
    let (rows, columns) = (p.0[0].rows(), p.0[0].columns());
    let host = |t: &Tensor| t.as_host().expect("a bias is f32 in host memory").to_vec();
    let mut bias = host(&p.0[0]);
    moved(&mut bias, loads, by);
    if let Some(keep) = ema {
        let average = averaged(&host(&p.0[OptimizerSpec::AVERAGE]), &bias, keep);
        p.0[OptimizerSpec::AVERAGE] = Tensor::from_vec(rows, columns, average);
    }
    p.0[0] = Tensor::from_vec(rows, columns, bias);
}

/// Moves each expert's bias against its load (technical report 2.1.2): down by `by` if it had more than
/// the mean, up if less.
fn moved(bias: &mut [f32], loads: &[u64], by: f32) {
    let total: u64 = loads.iter().sum();
    let n = loads.len() as u64;
    for (bias, load) in bias.iter_mut().zip(loads) {
        match (load * n).cmp(&total) {
            std::cmp::Ordering::Greater => *bias -= by,
            std::cmp::Ordering::Less => *bias += by,
            std::cmp::Ordering::Equal => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_splits_at_the_largest_power_of_two() {
        let shown = |n: usize| {
            let parts: Vec<String> = (0..n).map(|i| i.to_string()).collect();
            tree(&parts, &|a: String, b: String| format!("({a}{b})"))
        };
        assert_eq!(shown(1), "0");
        assert_eq!(shown(2), "(01)");
        assert_eq!(shown(3), "((01)2)");
        assert_eq!(shown(5), "(((01)(23))4)");
        assert_eq!(shown(6), "(((01)(23))(45))");
        assert_eq!(shown(8), "(((01)(23))((45)(67)))");
    }

    #[test]
    fn a_digest_sees_every_bit() {
        let of = |a: f32, number: u32, load: u64| {
            digest(&[(number, Arc::new(vec![1.0, a])), (9, Arc::new(vec![0.5]))], &[vec![3, load]])
        };
        let all = [of(0.0, 4, 1), of(-0.0, 4, 1), of(f32::from_bits(1), 4, 1), of(0.0, 5, 1), of(0.0, 4, 2)];
        let distinct: std::collections::BTreeSet<u128> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(all[0], of(0.0, 4, 1));
    }

    #[test]
    fn biases_move_against_the_load() {
        let mut bias = [0.0, 1.0, 0.0, 0.0];
        moved(&mut bias, &[9, 3, 4, 4], 0.5);
        assert_eq!(bias, [-0.5, 1.5, 0.5, 0.5]);
        moved(&mut bias, &[2, 2, 2, 2], 0.5);
        assert_eq!(bias, [-0.5, 1.5, 0.5, 0.5]);
    }
}
