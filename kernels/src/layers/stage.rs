//! The layers of one pipeline stage of one lane, as operations on micro-batches.
//!
//! A forward or backward function runs until it needs the experts, gives their rows out, and is
//! resumed with what they made of them. Between operations everything is here: saved activations,
//! weight products that wait, and the sums of the lane.
//!
//! Sums: weight products are added in the order of the calls of [`StageModel::weight`]; the caller
//! keeps it ascending in micro-batches (DESIGN 3.1).

use super::attention::{Attention, AttentionSaved};
use super::mixture::{FeedForwardSaved, Half, Mixture, Sent, SentBack};
use super::{ParameterMap, Product, Products, Weight};
use crate::backend::Backend;
use crate::model::{Group, ModelConfig, NORM_EPS};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What enters a stage.
#[derive(Debug, Clone)]
pub enum StageInput {
    /// Tokens of whole sequences, for the first stage.
    Tokens(Vec<u32>),
    /// The stage before's result, `[T, D]`.
    Hidden(Tensor),
}

/// The next token of every position, and the reciprocal of their number in the whole step.
#[derive(Debug, Clone)]
pub struct Targets {
    /// One for each token.
    pub tokens: Vec<u32>,
    /// What gradients are multiplied with.
    pub scale: f32,
}

/// How far an operation came.
#[derive(Debug, Clone)]
pub enum Progress {
    /// It needs the experts of `layer`: for each its rows, possibly none.
    Experts {
        /// The layer.
        layer: u32,
        /// Rows by expert.
        rows: Vec<Tensor>,
    },
    /// It is done; `[T, D]` goes to the next stage, or back to the one before.
    Hidden(Tensor),
    /// It is done, and nothing leaves the stage (a loss, or the gradient of the embedding).
    Finished,
}

/// What a lane's stage adds up in a step.
#[derive(Debug, Clone, Default)]
pub struct StageSums {
    /// Weight gradients by parameter.
    pub gradients: ParameterMap,
    /// Rows by expert, for each mixture layer.
    pub loads: BTreeMap<u32, Vec<u64>>,
    /// Sum of the losses of the targets, if this is the last stage.
    pub loss: f64,
}

#[derive(Debug, Clone)]
struct Layer {
    index: u32,
    attention: Attention,
    mixture: Mixture,
}

#[derive(Debug, Clone)]
struct Head {
    norm: Weight,
    weight: Weight,
}

/// A micro-batch between two operations.
#[derive(Debug, Default)]
struct MicroBatch {
    tokens: Option<Tensor>,
    targets: Option<Targets>,
    saved: Vec<(AttentionSaved, FeedForwardSaved)>,
    /// The layer that waits for its experts, and what it keeps meanwhile.
    waiting: Option<(usize, Waiting)>,
    /// Final hidden state, its norm and the gradient of the logits.
    head: Option<(Tensor, Tensor, Tensor)>,
    products: Products,
}

#[derive(Debug)]
enum Waiting {
    Forward { attention: AttentionSaved, sent: Box<Sent> },
    Backward { attention: AttentionSaved, sent: Box<SentBack> },
}

/// See the module.
#[derive(Debug)]
pub struct StageModel {
    config: Arc<ModelConfig>,
    embedding: Option<Weight>,
    layers: Vec<Layer>,
    head: Option<Head>,
    batches: BTreeMap<u32, MicroBatch>,
    sums: StageSums,
}

impl StageModel {
    /// Groups of parameters that a stage with `layers` needs.
    pub fn groups(config: &ModelConfig, layers: Range<usize>) -> Vec<Group> {
        let mut groups = Vec::new();
        if layers.start == 0 {
            groups.push(Group::Embedding);
        }
        groups.extend(layers.clone().map(|l| Group::Layer(l as u32)));
        if layers.end == config.layers {
            groups.push(Group::Head);
        }
        groups
    }

    /// A stage with the parameters of its groups, at the start of a step.
    pub fn new(config: Arc<ModelConfig>, layers: Range<usize>, map: &ParameterMap) -> Self {
        let embedding = (layers.start == 0).then(|| Weight::take(map, "", "model.embed_tokens.weight"));
        let head = (layers.end == config.layers).then(|| Head {
            norm: Weight::take(map, "", "model.norm.weight"),
            weight: Weight::take(map, "", "lm_head.weight"),
        });
        let layers = layers
            .map(|index| {
                let prefix = format!("model.layers.{index}.");
                Layer {
                    index: index as u32,
                    attention: Attention::new(map, &prefix, &config),
                    mixture: Mixture::new(map, &prefix, &config, index),
                }
            })
            .collect();
        Self { config, embedding, layers, head, batches: BTreeMap::new(), sums: StageSums::default() }
    }

    fn batch(&mut self, micro_batch: u32) -> &mut MicroBatch {
        self.batches.get_mut(&micro_batch).expect("an operation follows the forward function of its micro-batch")
    }

    /// Starts the forward function; `targets` for the last stage.
    pub fn forward(
        &mut self,
        b: &dyn Backend,
        micro_batch: u32,
        input: StageInput,
        targets: Option<Targets>,
    ) -> Progress {
        let mut batch = MicroBatch { targets, ..MicroBatch::default() };
        let h = match input {
            StageInput::Hidden(h) => h,
            StageInput::Tokens(tokens) => {
                let tokens = b.upload_indices(tokens);
                let table = self.embedding.as_ref().expect("tokens enter the first stage");
                let h = b.embedding(&tokens, &table.value);
                batch.tokens = Some(tokens);
                h
            }
        };
        self.batches.insert(micro_batch, batch);
        self.forward_from(b, micro_batch, 0, h)
    }

    /// Goes on with the rows of the experts that the forward function asked for.
    pub fn resume_forward(&mut self, b: &dyn Backend, micro_batch: u32, rows: Vec<Tensor>) -> Progress {
        let batch = self.batch(micro_batch);
        let Some((at, Waiting::Forward { attention, sent })) = batch.waiting.take() else {
            unreachable!("experts answer a forward function that waits for them");
        };
        let (h, saved) = Mixture::forward_rest(b, sent, rows);
        batch.saved.push((attention, saved));
        self.forward_from(b, micro_batch, at + 1, h)
    }

    fn forward_from(&mut self, b: &dyn Backend, micro_batch: u32, from: usize, mut h: Tensor) -> Progress {
        let config = Arc::clone(&self.config);
        for at in from..self.layers.len() {
            let layer = &self.layers[at];
            let (out, attention) = layer.attention.forward(b, h, &config);
            match layer.mixture.forward(b, out, &config) {
                Half::Done((out, saved)) => {
                    h = out;
                    self.batch(micro_batch).saved.push((attention, saved));
                }
                Half::Experts { rows, sent } => {
                    let layer = layer.index;
                    let counts = sent.plan.counts();
                    let loads = self.sums.loads.entry(layer).or_insert_with(|| vec![0; counts.len()]);
                    loads.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                    self.batch(micro_batch).waiting = Some((at, Waiting::Forward { attention, sent }));
                    return Progress::Experts { layer, rows };
                }
            }
        }
        let Some(head) = self.head.clone() else { return Progress::Hidden(h) };
        let x = b.rms_norm(&h, &head.norm.value, NORM_EPS);
        let logits = b.linear(&x, &head.weight.value);
        let batch = self.batch(micro_batch);
        let Some(targets) = batch.targets.take() else { return Progress::Hidden(logits) };
        let (losses, dlogits) = b.cross_entropy(&logits, &b.upload_indices(targets.tokens), targets.scale);
        batch.head = Some((h, x, dlogits));
        let losses = b.read(&losses).expect("the loss is read before it is reported");
        self.sums.loss += losses.iter().map(|l| f64::from(*l)).sum::<f64>();
        Progress::Finished
    }

    /// Starts the input part of the backward function with the next stage's gradient (none for the last stage).
    pub fn backward_input(&mut self, b: &dyn Backend, micro_batch: u32, gradient: Option<Tensor>) -> Progress {
        let head = self.head.clone();
        let batch = self.batch(micro_batch);
        let dh = match (head, batch.head.take(), gradient) {
            (Some(head), Some((h, x, dlogits)), None) => {
                let dx = b.linear_backward_input(&dlogits, &head.weight.value);
                let dh = b.rms_norm_backward_input(&h, &head.norm.value, &dx, NORM_EPS);
                batch.products.push((head.weight.name, Product::Linear { dy: dlogits, x }));
                batch.products.push((head.norm.name, Product::RmsNorm { dy: dx, x: h }));
                dh
            }
            (None, None, Some(gradient)) => gradient,
            (Some(_) | None, _, _) => unreachable!("the last stage makes its gradient, the others get it"),
        };
        self.backward_from(b, micro_batch, self.layers.len(), dh)
    }

    /// Goes on with the input gradients of the experts that the backward function asked for.
    pub fn resume_backward(&mut self, b: &dyn Backend, micro_batch: u32, rows: Vec<Tensor>) -> Progress {
        let config = Arc::clone(&self.config);
        let batch = self.batches.get_mut(&micro_batch).expect("an operation follows its forward function");
        let Some((at, Waiting::Backward { attention, sent })) = batch.waiting.take() else {
            unreachable!("experts answer a backward function that waits for them");
        };
        let layer = &self.layers[at];
        let dh = layer.mixture.backward_rest(b, *sent, &rows, &mut batch.products);
        let dh = layer.attention.backward_input(b, attention, &dh, &config, &mut batch.products);
        self.backward_from(b, micro_batch, at, dh)
    }

    /// Runs the layers below `end`, from the last to the first.
    fn backward_from(&mut self, b: &dyn Backend, micro_batch: u32, end: usize, mut dh: Tensor) -> Progress {
        let config = Arc::clone(&self.config);
        let batch = self.batches.get_mut(&micro_batch).expect("an operation follows its forward function");
        for at in (0..end).rev() {
            let layer = &self.layers[at];
            let (attention, saved) = batch.saved.pop().expect("each layer saved its activations");
            match layer.mixture.backward_input(b, saved, dh, &config, &mut batch.products) {
                Half::Done(out) => {
                    dh = layer.attention.backward_input(b, attention, &out, &config, &mut batch.products)
                }
                Half::Experts { rows, sent } => {
                    batch.waiting = Some((at, Waiting::Backward { attention, sent }));
                    return Progress::Experts { layer: layer.index, rows };
                }
            }
        }
        let (Some(table), Some(tokens)) = (&self.embedding, batch.tokens.take()) else { return Progress::Hidden(dh) };
        let vocabulary = table.value.rows();
        batch.products.push((table.name.clone(), Product::Embedding { dy: dh, tokens, vocabulary }));
        Progress::Finished
    }

    /// Makes the weight products of a micro-batch, adds them to the sums and forgets the micro-batch.
    pub fn weight(&mut self, b: &dyn Backend, micro_batch: u32) {
        let batch = self.batches.remove(&micro_batch).expect("a weight operation follows its backward function");
        for (name, product) in batch.products {
            let product = product.make(b);
            let sum = match self.sums.gradients.get(&name) {
                Some(sum) => b.add(sum, &product),
                None => product,
            };
            self.sums.gradients.insert(name, sum);
        }
    }

    /// The lane's sums of this step; afterwards there are none.
    pub fn take_sums(&mut self) -> StageSums {
        std::mem::take(&mut self.sums)
    }
}
