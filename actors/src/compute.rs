//! The heavy half of the workers: jobs that run off the runtime's threads, each a pure function.

use crate::ids::{ActorId, Address, Step};
use crate::message::{Body, Corruption, Pass, Turn, Work, WorkItem, WorkResult};
use crate::reducer::{Applied, Apply, ParameterData, Reduce, Reduced, State, initial};
use crate::spec::JobSpec;
use everstep_kernels::{
    Backend, ExpertHeld, ExpertWeights, Parameter, Progress, RowsRecipe, StageInput, StageModel, Tensor,
    expert_backward_input, expert_backward_weight, expert_forward,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A stage's operation, with all it needs.
#[derive(Debug)]
pub enum StageOperation {
    /// Forward of a micro-batch, up to the first experts.
    Forward {
        /// Which.
        micro_batch: u32,
        /// What enters.
        input: StageInput,
        /// The next tokens, for the last stage.
        targets: Option<Vec<u32>>,
    },
    /// Input part of the backward, up to the first experts.
    BackwardInput {
        /// Which.
        micro_batch: u32,
        /// From the next stage.
        gradient: Option<Tensor>,
    },
    /// Goes on with the experts' rows.
    Resume {
        /// Which.
        micro_batch: u32,
        /// Forward or backward.
        pass: Pass,
        /// Whose experts were waited for.
        layer: u32,
        /// By expert.
        rows: Vec<Tensor>,
    },
    /// Weight part of the backward, as far as its input part has come: it waits for experts.
    WeightSoFar {
        /// Which.
        micro_batch: u32,
        /// Whose experts are waited for.
        layer: u32,
    },
    /// The rest of the weight part.
    Weight {
        /// Which.
        micro_batch: u32,
    },
}

/// Rows that an expert's new life has not got.
#[derive(Debug, Clone)]
pub struct RowsAgain {
    /// The new life.
    pub to: Address,
    /// Whose rows.
    pub turn: Turn,
    /// Activations, or gradients of the expert's results.
    pub pass: Pass,
    /// How they are made.
    pub recipe: RowsRecipe,
}

impl RowsAgain {
    fn expert(&self) -> u32 {
        let ActorId::Expert { expert, .. } = self.to.actor else { unreachable!("rows are an expert's") };
        expert
    }

    /// Multiply-adds: one of each element, on the way back.
    pub(crate) fn cost(&self) -> u64 {
        match self.pass {
            Pass::Forward => 0,
            Pass::Backward => self.recipe.elements(self.expert()) as u64,
        }
    }

    fn run(&self, b: &dyn Backend) -> (ActorId, Body<Tensor>) {
        let rows = self.recipe.rows(b, self.expert());
        (self.to.actor, Body::Rows { turn: self.turn, pass: self.pass, rows })
    }
}

/// Something to compute.
#[derive(Debug)]
pub enum Job {
    /// A stage's operation.
    Stage {
        /// The step it belongs to.
        step: Step,
        /// The stage's layers.
        model: Box<StageModel>,
        /// What to do.
        operation: StageOperation,
    },
    /// Rows for experts, made again.
    Rows(Vec<RowsAgain>),
    /// A host's batch, all of it for the first time or all of it again.
    Experts(Vec<WorkItem>),
    /// An expert's weight gradient of one micro-batch.
    ExpertWeight {
        /// The step it belongs to.
        step: Step,
        /// Which.
        micro_batch: u32,
        /// The expert's weights.
        weights: ExpertWeights,
        /// Rows by lane.
        parts: Vec<ExpertHeld>,
        /// The sum so far.
        sums: Option<Vec<Tensor>>,
    },
    /// The state before the first step.
    Initial {
        /// Of what job.
        spec: Arc<JobSpec>,
        /// Whose.
        parameters: Vec<Parameter>,
    },
    /// Another copy's state becomes this one's: its fingerprint is made.
    Adopt {
        /// The step after which it is.
        step: Step,
        /// All of it.
        parameters: Vec<ParameterData>,
    },
    /// Whether a state is what it was when it was made.
    Check(State),
    /// The hash of what an actor made in a step.
    Digest {
        /// The step.
        step: Step,
        /// All of it, and for whom.
        messages: Vec<(ActorId, Body<Tensor>)>,
    },
    /// Adds a step's sums over the lanes.
    Reduce(Reduce),
    /// The optimizer step.
    Apply(Apply),
}

/// What came of a [`Job`].
#[derive(Debug)]
pub enum Outcome {
    /// Of a stage's operation.
    Stage {
        /// The step it belongs to.
        step: Step,
        /// The stage's layers.
        model: Box<StageModel>,
        /// Forward or backward.
        pass: Pass,
        /// How far it came.
        progress: Progress,
    },
    /// Rows for experts, made again.
    Rows(Vec<(ActorId, Body<Tensor>)>),
    /// Of a host's batch.
    Experts(Vec<(Address, ActorId, Turn, WorkResult)>),
    /// Of a weight gradient.
    ExpertWeight {
        /// The step it belongs to.
        step: Step,
        /// The sum with it.
        sums: Vec<Tensor>,
    },
    /// A reducer's first or next state, unless the one before had changed by itself.
    Applied(Result<Applied, Corruption>),
    /// Whether a state has.
    Checked(Result<(), Corruption>),
    /// What an actor made in a step.
    Digest {
        /// The step.
        step: Step,
        /// Its hash.
        digest: u128,
    },
    /// The step's sums.
    Reduced(Reduced),
}

/// Runs a job. Never called on a runtime's thread.
pub fn run(job: Job, b: &dyn Backend) -> Outcome {
    match job {
        Job::Stage { step, mut model, operation } => {
            let (pass, progress) = run_stage(&mut model, operation, b);
            Outcome::Stage { step, model, pass, progress }
        }
        Job::Rows(rows) => Outcome::Rows(rows.iter().map(|rows| rows.run(b)).collect()),
        Job::Experts(items) => Outcome::Experts(run_experts(items, b)),
        Job::ExpertWeight { step, weights, parts, sums, .. } => {
            // In order of name, like the numbers of parameters.
            let products = expert_backward_weight(b, &weights, &parts).into_values();
            let sums = match sums {
                Some(sums) => sums.iter().zip(products).map(|(s, p)| b.accumulate(s, &p)).collect(),
                None => products.collect(),
            };
            Outcome::ExpertWeight { step, sums }
        }
        Job::Initial { spec, parameters } => Outcome::Applied(Ok(initial(&spec, &parameters))),
        Job::Adopt { step, parameters } => {
            let sums = parameters.iter().map(ParameterData::sum).collect();
            Outcome::Applied(Ok(Applied { step, parameters, sums }))
        }
        Job::Check(state) => Outcome::Checked(state.check()),
        Job::Digest { step, messages } => Outcome::Digest { step, digest: crate::audit::digest(&messages) },
        Job::Reduce(reduce) => Outcome::Reduced(reduce.run()),
        Job::Apply(apply) => Outcome::Applied(apply.run()),
    }
}

/// The same; a panic gives its words.
pub(crate) fn attempt(job: Job, b: &dyn Backend) -> Result<Outcome, String> {
    catch_unwind(AssertUnwindSafe(|| run(job, b))).map_err(|panic| words_of_panic(&*panic))
}

/// What a panic says, for people.
pub(crate) fn words_of_panic(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".to_owned())
}

fn run_stage(model: &mut StageModel, operation: StageOperation, b: &dyn Backend) -> (Pass, Progress) {
    match operation {
        StageOperation::Forward { micro_batch, input, targets } => {
            (Pass::Forward, model.forward(b, micro_batch, input, targets))
        }
        StageOperation::BackwardInput { micro_batch, gradient } => {
            (Pass::Backward, model.backward_input(b, micro_batch, gradient))
        }
        StageOperation::Resume { micro_batch, pass: Pass::Forward, rows, .. } => {
            (Pass::Forward, model.resume_forward(b, micro_batch, rows))
        }
        StageOperation::Resume { micro_batch, pass: Pass::Backward, rows, .. } => {
            (Pass::Backward, model.resume_backward(b, micro_batch, rows))
        }
        StageOperation::WeightSoFar { micro_batch, .. } => (Pass::Backward, model.weight_so_far(b, micro_batch)),
        StageOperation::Weight { micro_batch } => {
            model.weight(b, micro_batch);
            (Pass::Backward, Progress::Finished)
        }
    }
}

/// One batch forward and one backward.
fn run_experts(items: Vec<WorkItem>, b: &dyn Backend) -> Vec<(Address, ActorId, Turn, WorkResult)> {
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    let (mut forward_of, mut backward_of) = (Vec::new(), Vec::new());
    for item in items {
        let whose = (item.expert, item.stage.actor, item.turn);
        match item.work {
            Work::Forward { x } => {
                forward.push((item.weights, x));
                forward_of.push(whose);
            }
            Work::Backward { saved, dy } => {
                backward.push((item.weights, (saved, dy)));
                backward_of.push(whose);
            }
        }
    }
    let forward = expert_forward(b, forward).into_iter().map(|(y, saved)| WorkResult::Forward { y, saved });
    let backward = expert_backward_input(b, backward).into_iter().map(|(dx, held)| WorkResult::Backward { dx, held });
    let label = |((expert, stage, turn), result)| (expert, stage, turn, result);
    forward_of.into_iter().zip(forward).map(label).chain(backward_of.into_iter().zip(backward).map(label)).collect()
}
