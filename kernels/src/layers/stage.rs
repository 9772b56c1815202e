//! The layers of one pipeline stage of one lane, as operations on micro-batches.
//!
//! A forward or backward function runs until it needs the experts, gives their rows out, and is
//! resumed with what they made of them. Between operations everything is here: saved activations,
//! weight products that wait, and the sums of the lane.
//!
//! Sums: weight products are added in the order of the calls of [`StageModel::weight`] and
//! [`StageModel::weight_so_far`]; the caller keeps it ascending in micro-batches (DESIGN 3.1).

use super::attention::{Attention, AttentionSaved};
use super::mixture::{FeedForwardSaved, Half, Mixture, Sent, SentBack};
use super::mtp::{Entered, Left, Prediction};
use super::{ParameterMap, Product, Products, RowsRecipe, Weight};
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

/// What the parts of a step's loss are multiplied with, the reciprocal of its targets among it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scales {
    /// The main loss.
    pub loss: f32,
    /// The loss of multi-token prediction.
    pub mtp: f32,
    /// The sequence-wise balance loss.
    pub balance: f32,
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
        /// How to make them again.
        recipe: RowsRecipe,
    },
    /// It still needs them: weight products were made meanwhile.
    Waits {
        /// The layer.
        layer: u32,
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
    /// Sums of the losses of the targets, if this is the last stage: of the main model, and of
    /// multi-token prediction.
    pub losses: [f64; 2],
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
    targets: Option<Vec<u32>>,
    saved: Vec<(AttentionSaved, FeedForwardSaved)>,
    /// The layer that waits for its experts, and what it keeps meanwhile.
    waiting: Option<(usize, Waiting)>,
    /// Final hidden state, its norm and the gradient of the logits.
    head: Option<(Tensor, Tensor, Tensor)>,
    prediction: Option<(Entered, Option<Left>)>,
    products: Products,
}

#[derive(Debug)]
enum Waiting {
    Forward { attention: AttentionSaved, sent: Box<Sent> },
    Backward { attention: AttentionSaved, sent: Box<SentBack> },
}

/// A micro-batch in work; its map alone is borrowed.
fn batch_of(batches: &mut BTreeMap<u32, MicroBatch>, micro_batch: u32) -> &mut MicroBatch {
    batches.get_mut(&micro_batch).expect("an operation follows the forward function of its micro-batch")
}

/// The sum of losses, in their order.
fn sum(b: &dyn Backend, losses: &Tensor) -> f64 {
    let losses = b.read(losses).expect("the loss is read before it is reported");
    losses.iter().map(|l| f64::from(*l)).sum()
}

/// See the module.
#[derive(Debug)]
pub struct StageModel {
    config: Arc<ModelConfig>,
    scales: Scales,
    embedding: Option<Weight>,
    /// The layers, then the block of multi-token prediction.
    layers: Vec<Layer>,
    /// Layers without that block.
    main: usize,
    head: Option<Head>,
    prediction: Option<Prediction>,
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
            groups.extend((config.layers..config.blocks()).map(|l| Group::Layer(l as u32)));
            groups.push(Group::Head);
            if config.mtp > 0 && layers.start > 0 {
                groups.push(Group::Embedding);
            }
        }
        groups
    }

    /// A stage with the parameters of its groups, at the start of a step.
    pub fn new(config: Arc<ModelConfig>, layers: Range<usize>, map: &ParameterMap, scales: Scales) -> Self {
        let embedding = (layers.start == 0).then(|| Weight::take(map, "", "model.embed_tokens.weight"));
        let head = (layers.end == config.layers).then(|| Head {
            norm: Weight::take(map, "", "model.norm.weight"),
            weight: Weight::take(map, "", "lm_head.weight"),
        });
        let (main, last) = (layers.len(), layers.end == config.layers);
        let prediction =
            (last && config.mtp > 0).then(|| Prediction::new(map, &format!("model.layers.{}.", config.layers)));
        let layers = layers
            .chain(config.layers..if last { config.blocks() } else { config.layers })
            .map(|index| {
                let prefix = format!("model.layers.{index}.");
                Layer {
                    index: index as u32,
                    attention: Attention::new(map, &prefix, &config),
                    mixture: Mixture::new(map, &prefix, &config, index),
                }
            })
            .collect();
        let (batches, sums) = (BTreeMap::new(), StageSums::default());
        Self { config, scales, embedding, layers, main, head, prediction, batches, sums }
    }

    /// Starts the forward function; `targets`, the next token of every position, for the last stage.
    /// Without them it gives logits, and predicts one token only.
    pub fn forward(
        &mut self,
        b: &dyn Backend,
        micro_batch: u32,
        input: StageInput,
        targets: Option<Vec<u32>>,
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
        let batch = batch_of(&mut self.batches, micro_batch);
        let Some((at, Waiting::Forward { attention, sent })) = batch.waiting.take() else {
            unreachable!("experts answer a forward function that waits for them");
        };
        let (h, saved) = Mixture::forward_rest(b, sent, rows);
        batch.saved.push((attention, saved));
        self.forward_from(b, micro_batch, at + 1, h)
    }

    fn forward_from(&mut self, b: &dyn Backend, micro_batch: u32, from: usize, mut h: Tensor) -> Progress {
        let config = Arc::clone(&self.config);
        for at in from..=self.layers.len() {
            if at == self.main {
                match self.leave_main(b, micro_batch, h) {
                    Progress::Hidden(out)
                        if self.prediction.is_some() && batch_of(&mut self.batches, micro_batch).targets.is_some() =>
                    {
                        h = out;
                    }
                    left => return left,
                }
            }
            let Some(layer) = self.layers.get(at) else { break };
            let (out, attention) = layer.attention.forward(b, h, &config);
            match layer.mixture.forward(b, out, &config) {
                Half::Done((out, saved)) => {
                    h = out;
                    batch_of(&mut self.batches, micro_batch).saved.push((attention, saved));
                }
                Half::Experts { rows, recipe, sent } => {
                    let layer = layer.index;
                    let counts = sent.plan.counts();
                    let loads = self.sums.loads.entry(layer).or_insert_with(|| vec![0; counts.len()]);
                    loads.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                    batch_of(&mut self.batches, micro_batch).waiting = Some((at, Waiting::Forward { attention, sent }));
                    return Progress::Experts { layer, rows, recipe };
                }
            }
        }
        self.leave_prediction(b, micro_batch, h);
        Progress::Finished
    }

    /// After the last layer: the hidden state for the next stage; or logits; or the loss, and with
    /// multi-token prediction the input of its block.
    fn leave_main(&mut self, b: &dyn Backend, micro_batch: u32, h: Tensor) -> Progress {
        let Some(head) = &self.head else { return Progress::Hidden(h) };
        let x = b.rms_norm(&h, &head.norm.value, NORM_EPS);
        let logits = b.linear(&x, &head.weight.value, head.weight.role);
        let batch = batch_of(&mut self.batches, micro_batch);
        let Some(targets) = &batch.targets else { return Progress::Hidden(logits) };
        let (losses, dlogits) = b.cross_entropy(&logits, &b.upload_indices(targets.clone()), self.scales.loss);
        self.sums.losses[0] += sum(b, &losses);
        let next = self.prediction.as_ref().map(|p| p.enter(b, x.clone(), targets));
        batch.head = Some((h, x, dlogits));
        let Some((h, entered)) = next else { return Progress::Finished };
        batch.prediction = Some((entered, None));
        Progress::Hidden(h)
    }

    /// After the block of multi-token prediction.
    fn leave_prediction(&mut self, b: &dyn Backend, micro_batch: u32, h: Tensor) {
        let batch = batch_of(&mut self.batches, micro_batch);
        let (Some(prediction), Some(targets), Some((_, left))) =
            (&self.prediction, &batch.targets, &mut batch.prediction)
        else {
            unreachable!("only a stage with multi-token prediction has a block after its layers");
        };
        let (losses, kept) = prediction.leave(b, h, targets, self.config.sequence, self.scales.mtp);
        *left = Some(kept);
        self.sums.losses[1] += sum(b, &losses);
    }

    /// Starts the input part of the backward function with the next stage's gradient (none for the last stage).
    pub fn backward_input(&mut self, b: &dyn Backend, micro_batch: u32, gradient: Option<Tensor>) -> Progress {
        let batch = batch_of(&mut self.batches, micro_batch);
        let dh = match (&self.prediction, &mut batch.prediction, gradient) {
            (Some(prediction), Some((_, left)), None) => {
                let left = left.take().expect("the forward function has left the block");
                prediction.backward_leave(b, left, &mut batch.products)
            }
            (_, _, Some(gradient)) => gradient,
            (_, _, None) => self.backward_head(b, micro_batch, None),
        };
        self.backward_from(b, micro_batch, self.layers.len(), dh)
    }

    /// Back through the head; `more` is what multi-token prediction adds to the normed state's gradient.
    fn backward_head(&mut self, b: &dyn Backend, micro_batch: u32, more: Option<Tensor>) -> Tensor {
        let batch = batch_of(&mut self.batches, micro_batch);
        let (Some(head), Some((h, x, dlogits))) = (&self.head, batch.head.take()) else {
            unreachable!("the last stage makes its gradient, the others get it");
        };
        let dx = b.linear_backward_input(&dlogits, &head.weight.value, head.weight.role);
        let dx = more.map_or_else(|| dx.clone(), |more| b.add(&dx, &more));
        let dh = b.rms_norm_backward_input(&h, &head.norm.value, &dx, NORM_EPS);
        batch.products.push((head.weight.name.clone(), Product::Linear { dy: dlogits, x, role: head.weight.role }));
        batch.products.push((head.norm.name.clone(), Product::RmsNorm { dy: dx, x: h }));
        dh
    }

    /// Goes on with the input gradients of the experts that the backward function asked for.
    pub fn resume_backward(&mut self, b: &dyn Backend, micro_batch: u32, rows: Vec<Tensor>) -> Progress {
        let config = Arc::clone(&self.config);
        let batch = batch_of(&mut self.batches, micro_batch);
        let Some((at, Waiting::Backward { attention, sent })) = batch.waiting.take() else {
            unreachable!("experts answer a backward function that waits for them");
        };
        let layer = &self.layers[at];
        let dh = layer.mixture.backward_rest(b, *sent, &rows, &mut batch.products);
        let dh = layer.attention.backward_input(b, attention, &dh, &config, &mut batch.products);
        let dh = self.below(b, micro_batch, at, dh);
        self.backward_from(b, micro_batch, at, dh)
    }

    /// What is between block `at` and the one below it: for the block of multi-token prediction, its
    /// entrance and the head of the main model.
    fn below(&mut self, b: &dyn Backend, micro_batch: u32, at: usize, dh: Tensor) -> Tensor {
        let batch = batch_of(&mut self.batches, micro_batch);
        let (Some(prediction), true) = (&self.prediction, at == self.main) else { return dh };
        let (entered, _) = batch.prediction.take().expect("the forward function has entered the block");
        let more = prediction.backward_enter(b, entered, dh, &mut batch.products);
        self.backward_head(b, micro_batch, Some(more))
    }

    /// Runs the layers below `end`, from the last to the first.
    fn backward_from(&mut self, b: &dyn Backend, micro_batch: u32, end: usize, mut dh: Tensor) -> Progress {
        let (config, balance) = (Arc::clone(&self.config), self.scales.balance);
        for at in (0..end).rev() {
            let batch = batch_of(&mut self.batches, micro_batch);
            let layer = &self.layers[at];
            let (attention, saved) = batch.saved.pop().expect("each layer saved its activations");
            match layer.mixture.backward_input(b, saved, dh, &config, balance, &mut batch.products) {
                Half::Done(out) => {
                    dh = layer.attention.backward_input(b, attention, &out, &config, &mut batch.products);
                    dh = self.below(b, micro_batch, at, dh);
                }
                Half::Experts { rows, recipe, sent } => {
                    batch.waiting = Some((at, Waiting::Backward { attention, sent }));
                    return Progress::Experts { layer: layer.index, rows, recipe };
                }
            }
        }
        let batch = batch_of(&mut self.batches, micro_batch);
        let (Some(table), Some(tokens)) = (&self.embedding, batch.tokens.take()) else { return Progress::Hidden(dh) };
        let vocabulary = table.value.rows();
        batch.products.push((table.name.clone(), Product::Embedding { dy: dh, tokens, vocabulary }));
        Progress::Finished
    }

    /// Makes the weight products of a micro-batch whose input part waits for experts, as far as it has come:
    /// their operands are still in the caches. For the micro-batch whose [`Self::weight`] comes next.
    pub fn weight_so_far(&mut self, b: &dyn Backend, micro_batch: u32) -> Progress {
        let batch = batch_of(&mut self.batches, micro_batch);
        let Some((at, _)) = &batch.waiting else {
            unreachable!("only a micro-batch that waits has a part of its products");
        };
        let layer = self.layers[*at].index;
        let products = std::mem::take(&mut batch.products);
        self.add(b, products);
        Progress::Waits { layer }
    }

    /// Makes the weight products of a micro-batch that are left, adds them to the sums and forgets the micro-batch.
    pub fn weight(&mut self, b: &dyn Backend, micro_batch: u32) {
        let batch = self.batches.remove(&micro_batch).expect("a weight operation follows its backward function");
        self.add(b, batch.products);
    }

    /// Adds products to the sums. Those of one parameter come in order of their micro-batches.
    fn add(&mut self, b: &dyn Backend, products: Products) {
        for (name, product) in products {
            let product = product.make(b);
            let sum = match self.sums.gradients.get(&name) {
                Some(sum) => b.accumulate(sum, &product),
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
