//! A configuration: TOML to a raw form that knows every key, to a checked [`Config`].
//!
//! Every error names the file, the line and the key, what was found and what was expected.

mod rules;

use crate::pieces::Pieces;
use crate::spec::{JobSpec, OptimizerSpec};
use everstep_kernels::{ModelConfig, Yarn};
use rules::check;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The whole file. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    run: RawRun,
    train: RawTrain,
    model: RawModel,
    job: RawJob,
    #[serde(default)]
    optimizer: RawOptimizer,
    #[serde(default)]
    data: RawData,
    checkpoint: RawCheckpoint,
    #[serde(default)]
    recovery: RawRecovery,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRun {
    folder: PathBuf,
    #[serde(default = "default_listen")]
    listen: String,
}

fn default_listen() -> String {
    "127.0.0.1:0".to_owned()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTrain {
    steps: u64,
    seed: u64,
    #[serde(default = "default_precision")]
    precision: String,
    #[serde(default = "default_device")]
    device: String,
}

fn default_precision() -> String {
    "fp32".to_owned()
}

fn default_device() -> String {
    "cpu".to_owned()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    /// Without it, that of the tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vocabulary: Option<usize>,
    hidden: usize,
    layers: usize,
    dense_layers: usize,
    dense_inner: usize,
    heads: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    query_rank: Option<usize>,
    kv_rank: usize,
    nope: usize,
    rope: usize,
    value: usize,
    #[serde(default)]
    experts: usize,
    #[serde(default)]
    shared_experts: usize,
    #[serde(default)]
    expert_inner: usize,
    #[serde(default)]
    top_k: usize,
    #[serde(default)]
    groups: usize,
    #[serde(default)]
    groups_kept: usize,
    #[serde(default = "default_routed_scale")]
    routed_scale: f32,
    sequence: usize,
    #[serde(default = "default_theta")]
    rope_theta: f64,
    #[serde(default)]
    mtp: usize,
    initial_std: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    yarn: Option<RawYarn>,
}

/// How a model is stretched to longer texts; the published model's values by default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawYarn {
    factor: f64,
    original: usize,
    #[serde(default = "default_beta_fast")]
    beta_fast: f64,
    #[serde(default = "one")]
    beta_slow: f64,
    #[serde(default = "one")]
    mscale: f64,
    #[serde(default = "one")]
    mscale_all_dim: f64,
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
struct RawJob {
    lanes: u32,
    stages: u32,
    micro_batches: Pieces<u32>,
    sequences: u32,
    #[serde(default = "default_schedule")]
    schedule: String,
    nodes: u32,
    shards: u32,
}

fn default_schedule() -> String {
    "1f1b".to_owned()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawOptimizer {
    lr: f64,
    lr_end: f64,
    warmup: u64,
    hold: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    decay_steps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tail_steps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tail_lr: Option<f64>,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    clip: f64,
    bias_step: Pieces<f32>,
    balance_weight: f32,
    mtp_weight: Pieces<f32>,
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
            clip: 1.0,
            bias_step: Pieces::Constant(0.001),
            balance_weight: 1e-4,
            mtp_weight: Pieces::Constant(0.3),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawData {
    paths: Vec<PathBuf>,
}

impl Default for RawData {
    fn default() -> Self {
        Self { paths: vec![PathBuf::from(".")] }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCheckpoint {
    every: u64,
    #[serde(default = "default_keep")]
    keep: usize,
}

fn default_keep() -> usize {
    3
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRecovery {
    mirrors: u32,
}

impl Default for RawRecovery {
    fn default() -> Self {
        Self { mirrors: 1 }
    }
}

/// A checked configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The job.
    pub spec: JobSpec,
    /// Where the run's files go.
    pub folder: PathBuf,
    /// Where the supervisor listens.
    pub listen: String,
    /// Nodes that the launcher starts, and that the job waits for.
    pub nodes: usize,
    /// Files and folders of the text.
    pub data_paths: Vec<PathBuf>,
    /// Checkpoints that are kept.
    pub keep: usize,
    /// The effective configuration as TOML.
    pub text: String,
}

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// It is not TOML, or a key is unknown, missing or of another type.
    #[error("{origin}: {message}")]
    Parse {
        /// The file.
        origin: String,
        /// Line, column, key and what is wrong.
        message: String,
    },
    /// A value cannot be.
    #[error("{origin}{}: {key} = {value}: {reason}", at_line(*.line))]
    Value {
        /// The file.
        origin: String,
        /// Its line; 0 if the key is not in the file.
        line: usize,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is expected.
        reason: String,
    },
    /// An override is not `KEY=VALUE`, or its key cannot be set.
    #[error("--set {text}: {reason}")]
    Override {
        /// As given.
        text: String,
        /// What is wrong.
        reason: String,
    },
}

impl Config {
    /// Reads a configuration. `origin` names it in errors; `overrides` are `KEY=VALUE`.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let parse = |e: toml::de::Error| ConfigError::Parse {
            origin: origin.to_owned(),
            message: e.to_string().trim_end().to_owned(),
        };
        // The file alone first, so that its errors come with their lines.
        let mut raw: Raw = toml::from_str(text).map_err(parse)?;
        if !overrides.is_empty() {
            let mut table: toml::Table = toml::from_str(text).map_err(parse)?;
            for o in overrides {
                set(&mut table, o)?;
            }
            let merged = toml::to_string(&table).expect("a table can be written");
            raw = toml::from_str(&merged)
                .map_err(|e| ConfigError::Override { text: overrides.join(" "), reason: e.message().to_owned() })?;
        }
        check(&raw, text, origin, overrides)?;
        let effective = toml::to_string(&raw).expect("a configuration can be written");
        Ok(Self {
            spec: spec(&raw),
            folder: raw.run.folder,
            listen: raw.run.listen,
            nodes: raw.job.nodes as usize,
            data_paths: raw.data.paths,
            keep: raw.checkpoint.keep,
            text: effective,
        })
    }
}

fn at_line(line: usize) -> String {
    if line == 0 { " (by default)".to_owned() } else { format!(", line {line}") }
}

/// Sets a dotted key in a table. Values are TOML; what is not, is a string.
fn set(table: &mut toml::Table, text: &str) -> Result<(), ConfigError> {
    let wrong = |reason: &str| ConfigError::Override { text: text.to_owned(), reason: reason.to_owned() };
    let (key, value) = text.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE"))?;
    let mut path: Vec<&str> = key.trim().split('.').collect();
    let last = path.pop().filter(|k| !k.is_empty()).ok_or_else(|| wrong("the key is empty"))?;
    let value = value.trim();
    let parsed = toml::from_str::<toml::Table>(&format!("x = {value}")).ok().and_then(|mut t| t.remove("x"));
    let mut at = table;
    for part in path {
        let next = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = next.as_table_mut().ok_or_else(|| wrong("a part of the key is not a table"))?;
    }
    at.insert(last.to_owned(), parsed.unwrap_or_else(|| toml::Value::String(value.to_owned())));
    Ok(())
}

/// The line of a key in the file; 0 if it is not there.
fn line_of(text: &str, key: &str) -> usize {
    let Ok(table) = toml::de::DeTable::parse(text) else { return 0 };
    let mut table = table.into_inner();
    let mut start = None;
    for part in key.split('.') {
        let Some((name, value)) = table.into_iter().find(|(k, _)| k.get_ref() == part) else { return 0 };
        start = Some(name.span().start);
        table = match value.into_inner() {
            toml::de::DeValue::Table(inner) => inner,
            _ => toml::de::DeTable::new(),
        };
    }
    start.map_or(0, |s| text[..s].lines().count().max(1) + usize::from(text[..s].ends_with('\n')))
}

/// Tokens where there is no tokenizer: the bytes of the text.
const BYTES: usize = 256;

fn yarn(raw: &RawYarn) -> Yarn {
    let RawYarn { factor, original, beta_fast, beta_slow, mscale, mscale_all_dim } = *raw;
    Yarn { factor, original, beta_fast, beta_slow, mscale, mscale_all_dim }
}

fn spec(raw: &Raw) -> JobSpec {
    let (m, j, o) = (&raw.model, &raw.job, &raw.optimizer);
    JobSpec {
        model: ModelConfig {
            vocabulary: m.vocabulary.unwrap_or(BYTES),
            hidden: m.hidden,
            layers: m.layers,
            dense_layers: m.dense_layers,
            dense_inner: m.dense_inner,
            heads: m.heads,
            query_rank: m.query_rank,
            kv_rank: m.kv_rank,
            nope: m.nope,
            rope: m.rope,
            value: m.value,
            experts: m.experts,
            shared_experts: m.shared_experts,
            expert_inner: m.expert_inner,
            top_k: m.top_k,
            groups: m.groups,
            groups_kept: m.groups_kept,
            routed_scale: m.routed_scale,
            sequence: m.sequence,
            rope_theta: m.rope_theta,
            yarn: m.yarn.as_ref().map(yarn),
            mtp: m.mtp,
            initial_std: m.initial_std,
        },
        seed: raw.train.seed,
        steps: raw.train.steps,
        optimizer: OptimizerSpec {
            lr: o.lr,
            lr_end: o.lr_end,
            warmup: o.warmup,
            hold: o.hold,
            decay_steps: o.decay_steps,
            tail: o.tail_steps.map(|steps| (steps, o.tail_lr.unwrap_or(o.lr_end))),
            beta1: o.beta1,
            beta2: o.beta2,
            eps: o.eps,
            weight_decay: o.weight_decay,
            clip: o.clip,
            bias_step: o.bias_step.clone(),
            balance: o.balance_weight,
            mtp: o.mtp_weight.clone(),
        },
        lanes: j.lanes,
        stages: j.stages,
        micro_batches: j.micro_batches.clone(),
        sequences: j.sequences,
        shards: j.shards,
        mirrors: raw.recovery.mirrors,
        checkpoint_every: raw.checkpoint.every,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = include_str!("../../configs/quickstart.toml");

    fn error(text: &str) -> String {
        Config::parse(text, "run.toml", &[]).unwrap_err().to_string()
    }

    #[test]
    fn the_quickstart_is_good_and_its_effective_form_is_the_same() {
        let config = Config::parse(GOOD, "quickstart.toml", &[]).unwrap();
        let again = Config::parse(&config.text, "config.toml", &[]).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let unknown = error(&GOOD.replace("[train]", "[train]\nstepz = 3"));
        assert!(unknown.contains("run.toml") && unknown.contains("line") && unknown.contains("stepz"), "{unknown}");
        let kind = error(&GOOD.replace("lanes = ", "lanes = true # "));
        assert!(kind.contains("lanes = true") && kind.contains("expected u32"), "{kind}");
        let line = GOOD.lines().position(|l| l.starts_with("groups = ")).unwrap() + 1;
        let old = GOOD.lines().find(|l| l.starts_with("groups = ")).unwrap();
        for (value, what) in [("3", "does not divide"), ("400", "more groups than")] {
            let text = error(&GOOD.replace(old, &format!("groups = {value}")));
            assert!(
                text.contains(&format!("run.toml, line {line}: model.groups = {value}")) && text.contains(what),
                "{text}"
            );
        }
    }

    #[test]
    fn overrides_are_checked_like_the_file() {
        let set = |o: &str| Config::parse(GOOD, "run.toml", &[o.to_owned()]);
        let ramp = set("job.micro_batches=[[0, 1], [50, 2]]").unwrap().spec.micro_batches;
        assert_eq!((ramp.at(49), ramp.at(50)), (1, 2));
        assert_eq!(set("train.steps=7").unwrap().spec.steps, 7);
        assert_eq!(set("run.folder=some/where").unwrap().folder, PathBuf::from("some/where"));
        for bad in [
            "train.steps",
            "train.stepz=7",
            "train.steps=x",
            "model.groups=7",
            "job.micro_batches=[[5, 1]]",
            "job.micro_batches=[[0, 0]]",
            "optimizer.bias_step=[]",
            "model.mtp=2",
            "model.yarn={factor = 0.5, original = 64}",
        ] {
            assert!(set(bad).is_err(), "{bad}");
        }
    }
}
