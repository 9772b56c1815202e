//! The keys of a configuration as they stand in the file, and their defaults.

use crate::pieces::Pieces;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The whole file. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) run: RawRun,
    pub(super) train: RawTrain,
    pub(super) model: RawModel,
    pub(super) job: RawJob,
    #[serde(default)]
    pub(super) optimizer: RawOptimizer,
    #[serde(default)]
    pub(super) data: RawData,
    pub(super) checkpoint: RawCheckpoint,
    #[serde(default)]
    pub(super) recovery: RawRecovery,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRun {
    pub(super) folder: PathBuf,
    /// Set by `import`: the first state is the run's checkpoint of step 0.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) imported: bool,
    #[serde(default = "default_listen")]
    pub(super) listen: String,
}

fn default_listen() -> String {
    "127.0.0.1:0".to_owned()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTrain {
    pub(super) steps: u64,
    pub(super) seed: u64,
    #[serde(default = "default_precision")]
    pub(super) precision: String,
    #[serde(default = "default_device")]
    pub(super) device: String,
}

fn default_precision() -> String {
    "fp32".to_owned()
}

fn default_device() -> String {
    "cpu".to_owned()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawModel {
    /// Without it, the bytes of the text; with a tokenizer it must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) vocabulary: Option<usize>,
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(super) dense_layers: usize,
    pub(super) dense_inner: usize,
    pub(super) heads: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) query_rank: Option<usize>,
    pub(super) kv_rank: usize,
    pub(super) nope: usize,
    pub(super) rope: usize,
    pub(super) value: usize,
    #[serde(default)]
    pub(super) experts: usize,
    #[serde(default)]
    pub(super) shared_experts: usize,
    #[serde(default)]
    pub(super) expert_inner: usize,
    #[serde(default)]
    pub(super) top_k: usize,
    #[serde(default)]
    pub(super) groups: usize,
    #[serde(default)]
    pub(super) groups_kept: usize,
    #[serde(default = "default_routed_scale")]
    pub(super) routed_scale: f32,
    pub(super) sequence: usize,
    #[serde(default = "default_theta")]
    pub(super) rope_theta: f64,
    #[serde(default)]
    pub(super) mtp: usize,
    pub(super) initial_std: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) yarn: Option<RawYarn>,
}

/// How a model is stretched to longer texts; the published model's values by default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawYarn {
    pub(super) factor: f64,
    pub(super) original: usize,
    #[serde(default = "default_beta_fast")]
    pub(super) beta_fast: f64,
    #[serde(default = "one")]
    pub(super) beta_slow: f64,
    #[serde(default = "one")]
    pub(super) mscale: f64,
    #[serde(default = "one")]
    pub(super) mscale_all_dim: f64,
}

fn default_beta_fast() -> f64 {
    32.0
}

fn one() -> f64 {
    1.0
}

fn default_routed_scale() -> f32 {
    2.5
}

fn default_theta() -> f64 {
    10_000.0
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawJob {
    pub(super) lanes: u32,
    pub(super) stages: u32,
    pub(super) micro_batches: Pieces<u32>,
    pub(super) sequences: u32,
    #[serde(default = "default_schedule")]
    pub(super) schedule: String,
    pub(super) nodes: u32,
    pub(super) shards: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pace: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<u64>,
}

fn default_schedule() -> String {
    "1f1b".to_owned()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawOptimizer {
    pub(super) lr: f64,
    pub(super) lr_end: f64,
    pub(super) warmup: u64,
    pub(super) hold: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) decay_steps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tail_steps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tail_lr: Option<f64>,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) eps: f64,
    pub(super) weight_decay: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ema: Option<f64>,
    pub(super) clip: f64,
    pub(super) bias_step: Pieces<f32>,
    pub(super) balance_weight: f32,
    pub(super) mtp_weight: Pieces<f32>,
}

impl Default for RawOptimizer {
    /// The technical report's values (section 4.2), with a learning rate for small models.
    fn default() -> Self {
        Self {
            lr: 1e-3,
            lr_end: 1e-4,
            warmup: 20,
            hold: 0,
            decay_steps: None,
            tail_steps: None,
            tail_lr: None,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            ema: None,
            clip: 1.0,
            bias_step: Pieces::Constant(0.001),
            balance_weight: 1e-4,
            mtp_weight: Pieces::Constant(0.3),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawData {
    /// One source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) paths: Option<Vec<PathBuf>>,
    /// A file of the `tokenizers` library; without it, text is bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tokenizer: Option<PathBuf>,
    /// The token at the end of a document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) end: Option<String>,
    /// Where tokens are kept for later runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cache: Option<PathBuf>,
    /// The column or key of the text in Parquet and JSONL files.
    pub(super) field: String,
    /// Several sources.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) sources: Vec<RawSource>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) eval: Option<RawEval>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSource {
    pub(super) paths: Vec<PathBuf>,
    #[serde(default = "one")]
    pub(super) weight: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawEval {
    pub(super) paths: Vec<PathBuf>,
    pub(super) every: u64,
    #[serde(default = "default_eval_sequences")]
    pub(super) sequences: u64,
}

fn default_eval_sequences() -> u64 {
    64
}

impl Default for RawData {
    fn default() -> Self {
        let (paths, tokenizer, end, cache, sources, eval) = (None, None, None, None, Vec::new(), None);
        Self { paths, tokenizer, end, cache, field: "text".to_owned(), sources, eval }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCheckpoint {
    pub(super) every: u64,
    #[serde(default = "default_keep")]
    pub(super) keep: usize,
    #[serde(default)]
    pub(super) store: Option<String>,
}

fn default_keep() -> usize {
    3
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawRecovery {
    pub(super) mirrors: u32,
    pub(super) when_thin: String,
    pub(super) spares: u32,
    pub(super) supervisors: u32,
    pub(super) audit: u32,
    pub(super) relieve: bool,
}

impl Default for RawRecovery {
    fn default() -> Self {
        let when_thin = "go_on".to_owned();
        Self { mirrors: 1, when_thin, spares: 0, supervisors: 1, audit: 0, relieve: false }
    }
}
