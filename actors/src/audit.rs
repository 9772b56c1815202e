//! An actor's work of a step as one number, so that two lives can be compared (DESIGN section 5).
//!
//! - AD-1: the number depends on every bit of every message that the actor made in the step and on whom it is for, and not
//!   on the order in which they were made.
//! - AD-2: a message that its sender does not keep for a receiver's next life is kept here in a step in which the sender is
//!   audited: what was made is compared, not what would be made again.
//! - AD-3: whatever is sent to an actor in a step in which it is audited is kept by its sender, not made again: all lives that
//!   are compared have the same inputs, whoever computes wrongly.

use crate::compute::Job;
use crate::effect::Effect;
use crate::ids::{ActorId, Step};
use crate::message::Body;
use crate::outbox::Outbox;
use crate::spec::JobSpec;
use everstep_kernels::{Philox, Tensor, Words};
use std::sync::Arc;

const PURPOSE_AUDIT: u32 = 7;

/// Whether an actor is audited in a step: one in `recovery.audit` is on the average.
pub(crate) fn is_due(spec: &JobSpec, actor: ActorId, step: Step) -> bool {
    let every = f64::from(spec.audit);
    let random = || Philox::named(spec.seed, PURPOSE_AUDIT, &actor.to_string());
    every > 0.0 && random().uniform(step) * every < 1.0
}

/// What the supervisor asks a life: what it made of a step.
#[derive(Debug)]
pub(crate) struct Question {
    spec: Arc<JobSpec>,
    me: ActorId,
    asked: Option<Step>,
    /// Of steps in which it is audited (AD-2).
    made: Vec<(Step, ActorId, Body<Tensor>)>,
}

impl Question {
    /// To an actor.
    pub(crate) fn new(spec: Arc<JobSpec>, me: ActorId) -> Self {
        Self { spec, me, asked: None, made: Vec::new() }
    }

    /// It asks; a later question takes the place of an earlier one.
    pub(crate) fn ask(&mut self, step: Step) {
        self.asked = Some(step);
    }

    /// Whether an actor is audited in a step (AD-3).
    pub(crate) fn is_due(&self, actor: ActorId, step: Step) -> bool {
        is_due(&self.spec, actor, step)
    }

    /// A message is made that is kept only if its receiver or its sender is audited (AD-3, AD-2).
    pub(crate) fn keep_for_either(&mut self, outbox: &mut Outbox, step: Step, to: ActorId, body: &Body<Tensor>) {
        if self.is_due(to, step) {
            outbox.keep(step, to, body.clone());
        } else {
            self.keep(step, to, body);
        }
    }

    /// A message is made that nobody else keeps.
    fn keep(&mut self, step: Step, to: ActorId, body: &Body<Tensor>) {
        if self.is_due(self.me, step) {
            self.made.push((step, to, body.clone()));
        }
    }

    /// Forgets messages of committed steps.
    pub(crate) fn forget_until(&mut self, committed: Step) {
        self.made.retain(|(step, ..)| *step > committed);
    }

    /// The job that makes the answer, if the step that is asked of is `made`, all of it. Once.
    pub(crate) fn answer(&mut self, made: Option<Step>, outbox: &Outbox) -> Option<Effect> {
        let step = self.asked.take_if(|asked| made == Some(*asked))?;
        let own = self.made.iter().filter(|(of, ..)| *of == step).map(|(_, to, body)| (*to, body.clone()));
        let messages = outbox.of(step).into_iter().chain(own).collect();
        Some(Effect::Compute { job: Job::Digest { step, messages }, cost: 0 })
    }
}

/// Tells the supervisor the answer.
pub(crate) fn tell(step: Step, digest: u128) -> Vec<Effect> {
    vec![Effect::send(ActorId::Supervisor, Body::Audited { step, digest })]
}

/// Of all messages of a step. One for every copy of a shard is named by the first copy.
pub(crate) fn digest(messages: &[(ActorId, Body<Tensor>)]) -> u128 {
    messages.iter().map(|(to, body)| of_message(*to, body)).fold(0, u128::wrapping_add)
}

fn of_message(to: ActorId, body: &Body<Tensor>) -> u128 {
    let mut hasher = blake3::Hasher::new();
    let key = body.clone().map(&mut |tensor: Tensor| {
        let (words, region) = tensor.to_words();
        hasher.update(bytemuck::cast_slice(&region));
        (tensor.rows() as u64, tensor.columns() as u64, words == Words::Bf16)
    });
    let key = bincode::serde::encode_to_vec((to, key), bincode::config::standard());
    hasher.update(&key.expect("a message can be encoded"));
    u128::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("a hash of 32 bytes"))
}

/// The tensor with another bit, as bad memory has it, or a unit that computes wrongly would have made it (chaos).
pub(crate) fn wrong(tensor: &Tensor) -> Tensor {
    let (words, region) = tensor.to_words();
    let mut data = region.to_vec();
    if let Some(first) = data.first_mut() {
        *first = f32::from_bits(first.to_bits() ^ 1 << 20);
    }
    Tensor::from_words(tensor.rows(), tensor.columns(), words, data.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Pass, Turn};
    use crate::testing::bits;

    /// AD-2: kept in steps with an audit, and until they are committed; asked of another step, nothing is told.
    #[test]
    fn what_an_audited_actor_made_is_kept() {
        let spec = Arc::new(JobSpec { audit: 3, ..crate::sim::spec(0) });
        let me = ActorId::Expert { layer: 1, expert: 0 };
        let mut question = Question::new(Arc::clone(&spec), me);
        let turn = |step| Turn { step, lane: 0, micro_batch: 0 };
        let body =
            |step| Body::Answer { turn: turn(step), pass: Pass::Forward, rows: Tensor::from_vec(1, 1, vec![1.0]) };
        let to = ActorId::Stage { lane: 0, stage: 0 };
        (1..=60).for_each(|step| question.keep(step, to, &body(step)));
        let due: Vec<Step> = (1..=60).filter(|step| is_due(&spec, me, *step)).collect();
        assert_eq!(question.made.iter().map(|(step, ..)| *step).collect::<Vec<_>>(), due);
        assert!((10..=30).contains(&due.len()), "one in three: {due:?}");
        question.ask(due[1]);
        assert!(question.answer(Some(due[0]), &Outbox::default()).is_none());
        let Some(Effect::Compute { job: Job::Digest { step, messages }, .. }) =
            question.answer(Some(due[1]), &Outbox::default())
        else {
            panic!("an answer")
        };
        assert_eq!((step, bits(&messages)), (due[1], bits(&[(to, body(due[1]))])));
        question.forget_until(due[1]);
        assert_eq!(question.made.len(), due.len() - 2);
    }

    /// AD-1.
    #[test]
    fn every_bit_counts_and_the_order_does_not() {
        let message = |expert: u32, lane: u32, rows: &Tensor| {
            let turn = Turn { step: 1, lane, micro_batch: 0 };
            (ActorId::Expert { layer: 1, expert }, Body::Rows { turn, pass: Pass::Forward, rows: rows.clone() })
        };
        let rows = Tensor::from_vec(1, 2, vec![0.0, 1.0]);
        let turned = Tensor::from_vec(2, 1, vec![0.0, 1.0]);
        let negative = Tensor::from_vec(1, 2, vec![-0.0, 1.0]);
        let [a, b] = [message(0, 0, &rows), message(1, 0, &rows)];
        assert_eq!(digest(&[a.clone(), b.clone()]), digest(&[b.clone(), a.clone()]));
        let others = [
            digest(&[a.clone(), b.clone()]),
            digest(std::slice::from_ref(&a)),
            digest(&[a.clone(), a.clone()]),
            digest(&[a.clone(), message(1, 1, &rows)]),
            digest(&[a.clone(), message(1, 0, &turned)]),
            digest(&[a.clone(), message(1, 0, &negative)]),
            digest(&[a, message(1, 0, &wrong(&rows))]),
        ];
        let distinct: std::collections::BTreeSet<u128> = others.into_iter().collect();
        assert_eq!(distinct.len(), others.len());
    }
}
