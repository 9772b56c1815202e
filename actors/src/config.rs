//! A configuration: TOML to a raw form that knows every key, to a checked [`Config`].
//!
//! Every error names the file, the line and the key, what was found and what was expected.

mod raw;
mod rules;

use crate::spec::{JobSpec, OptimizerSpec};
use everstep_kernels::{ModelConfig, Precision, Yarn};
use raw::{Raw, RawData, RawYarn};
use rules::check;
use std::path::PathBuf;

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
    /// Nodes beyond those that are held ready without actors.
    pub spares: usize,
    /// Nodes that are slow are given less to do.
    pub relieve: bool,
    /// Supervisors, one of which leads.
    pub supervisors: u64,
    /// Multiply-adds a second to which every thread of a node is held back, if it is: nodes that share a machine then
    /// have a speed of their own each.
    pub pace: Option<f64>,
    /// MiB that the actors of a node of the launcher's may need, if there is a limit.
    pub memory: Option<u64>,
    /// The text.
    pub data: DataConfig,
    /// Checkpoints that are kept.
    pub keep: usize,
    /// The object store that they are in, as a URL; none: the run's folder.
    pub store: Option<String>,
    /// The effective configuration as TOML.
    pub text: String,
}

/// Where the text comes from and how it becomes tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct DataConfig {
    /// At least one.
    pub sources: Vec<SourceConfig>,
    /// A file of the `tokenizers` library; without it, text is bytes.
    pub tokenizer: Option<PathBuf>,
    /// The token at the end of a document.
    pub end: Option<String>,
    /// Where tokens are kept for later runs; by default `cache` beside the run folder.
    pub cache: Option<PathBuf>,
    /// The column or key of the text in Parquet and JSONL files.
    pub field: String,
    /// Held-out text, if there is any.
    pub eval: Option<EvalConfig>,
}

/// One source of text.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceConfig {
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// Its share of the samples, relative to the others'.
    pub weight: f64,
}

/// Text that the model is not trained on.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalConfig {
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// Steps between evaluations.
    pub every: u64,
    /// Sequences that are looked at, evenly over the text.
    pub sequences: u64,
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
            spares: raw.recovery.spares as usize,
            relieve: raw.recovery.relieve,
            supervisors: u64::from(raw.recovery.supervisors),
            pace: raw.job.pace,
            memory: raw.job.memory,
            data: data(raw.data),
            keep: raw.checkpoint.keep,
            store: raw.checkpoint.store.clone(),
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

/// A precision by its name.
fn precision(name: &str) -> Option<Precision> {
    [Precision::Fp32, Precision::Bf16, Precision::Fp8].into_iter().find(|p| p.to_string() == name)
}

fn data(raw: RawData) -> DataConfig {
    let RawData { paths, tokenizer, end, cache, field, sources, eval } = raw;
    let sources = if sources.is_empty() {
        vec![SourceConfig { paths: paths.unwrap_or_else(|| vec![PathBuf::from(".")]), weight: 1.0 }]
    } else {
        sources.into_iter().map(|s| SourceConfig { paths: s.paths, weight: s.weight }).collect()
    };
    let eval = eval.map(|e| EvalConfig { paths: e.paths, every: e.every, sequences: e.sequences });
    DataConfig { sources, tokenizer, end, cache, field, eval }
}

/// The sources' weights; one source has a weight too.
fn weights(raw: &RawData) -> Vec<f64> {
    if raw.sources.is_empty() { vec![1.0] } else { raw.sources.iter().map(|s| s.weight).collect() }
}

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
        precision: precision(&raw.train.precision).unwrap_or_default(),
        seed: raw.train.seed,
        source_weights: weights(&raw.data),
        imported: raw.run.imported,
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
            ema: o.ema,
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
        thin_waits: raw.recovery.when_thin == "wait",
        audit: raw.recovery.audit,
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

    /// A key in the place of a store would be kept in every run's folder.
    #[test]
    fn a_store_with_a_secret_is_refused_and_not_shown() {
        let set = vec!["checkpoint.store=s3://key:hidden@bucket/jobs".to_owned()];
        let error = Config::parse(GOOD, "run.toml", &set).unwrap_err().to_string();
        assert!(error.contains("AWS_SECRET_ACCESS_KEY") && !error.contains("hidden"), "{error}");
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
            "job.pace=0",
            "job.pace=inf",
            "job.micro_batches=[[0, 0]]",
            "optimizer.bias_step=[]",
            "optimizer.ema=1.0",
            "optimizer.ema=0.99999999",
            "model.mtp=2",
            "model.yarn={factor = 0.5, original = 64}",
        ] {
            assert!(set(bad).is_err(), "{bad}");
        }
        let large = set("model.dense_inner=400000000").unwrap_err().to_string();
        assert!(large.contains("job.shards = ") && large.contains("expected more shards"), "{large}");
    }
}
