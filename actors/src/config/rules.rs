//! What must hold of a configuration beyond its types: rules by key, checked in order.

use super::raw::{Raw, RawData, RawJob, RawModel, RawOptimizer};
use super::{ConfigError, line_of};
use crate::pieces::Pieces;
use crate::spec::Layout;
use everstep_transport::{REGIONS_MAX, WORDS_MAX};

/// One rule: whether it holds, the key to blame, its value, and what is expected.
type Rule = (bool, &'static str, String, String);

/// The first rule that does not hold, as an error that says where the value comes from.
pub(super) fn check(raw: &Raw, text: &str, origin: &str, overrides: &[String]) -> Result<(), ConfigError> {
    let mut rules = size_rules(raw);
    rules.extend(supervisor_rules(raw));
    rules.extend(choice_rules(raw));
    rules.extend(node_rules(&raw.job));
    if raw.model.dense_layers < raw.model.layers {
        rules.extend(mixture_rules(&raw.model));
    }
    rules.extend(optimizer_rules(&raw.optimizer));
    rules.extend(data_rules(&raw.data, raw));
    let broken = rules.into_iter().find(|(holds, ..)| !holds);
    // Only of what can be laid out.
    let broken = broken.or_else(|| Some(shard_rule(raw)).filter(|(holds, ..)| !holds));
    let Some((_, key, value, reason)) = broken else { return Ok(()) };
    let set = overrides.iter().rev().find(|o| o.split('=').next().is_some_and(|k| k.trim() == key));
    match set {
        Some(_) => Err(ConfigError::Override { text: format!("{key}={value}"), reason }),
        None => {
            let (origin, key, line) = (origin.to_owned(), key.to_owned(), line_of(text, key));
            Err(ConfigError::Value { origin, line, key, value, reason })
        }
    }
}

/// A shard's state travels as one message.
fn shard_rule(raw: &Raw) -> Rule {
    let spec = super::spec(raw);
    let (layout, parts) = (Layout::new(&spec), spec.parts().len() as u64);
    let size = |shard| {
        let numbers = layout.of_shard(shard);
        let words: u64 = numbers.iter().map(|n| layout.parameters[*n as usize].len() as u64).sum();
        (numbers.len() as u64 * parts, words * parts)
    };
    let largest = |(regions, words): (u64, u64), (r, w): (u64, u64)| (regions.max(r), words.max(w));
    let (regions, words) = (0..spec.shards).map(size).fold((0, 0), largest);
    let holds = regions <= REGIONS_MAX as u64 && words <= WORDS_MAX;
    let reason = format!(
        "the largest shard's state has {regions} tensors and {words} words, a message {REGIONS_MAX} and {WORDS_MAX} at most: \
         expected more shards"
    );
    (holds, "job.shards", raw.job.shards.to_string(), reason)
}

/// Sizes that must not be zero.
fn size_rules(raw: &Raw) -> Vec<Rule> {
    let (m, j) = (&raw.model, &raw.job);
    let positive = |value: u64, key| (value > 0, key, value.to_string(), "expected at least 1".to_owned());
    let mut rules: Vec<Rule> = vec![
        positive(raw.train.steps, "train.steps"),
        positive(m.hidden as u64, "model.hidden"),
        positive(m.layers as u64, "model.layers"),
        positive(m.heads as u64, "model.heads"),
        positive(m.kv_rank as u64, "model.kv_rank"),
        positive(m.nope as u64, "model.nope"),
        positive(m.value as u64, "model.value"),
        positive(m.query_rank.unwrap_or(1) as u64, "model.query_rank"),
        positive(m.sequence as u64, "model.sequence"),
        positive(u64::from(j.lanes), "job.lanes"),
        positive(u64::from(j.stages), "job.stages"),
        positive(u64::from(j.sequences), "job.sequences"),
        positive(u64::from(j.nodes), "job.nodes"),
        positive(u64::from(j.shards), "job.shards"),
        positive(raw.checkpoint.every, "checkpoint.every"),
    ];
    if m.dense_layers > 0 {
        rules.push(positive(m.dense_inner as u64, "model.dense_inner"));
    }
    rules
}

/// What nodes are held to.
fn node_rules(j: &RawJob) -> [Rule; 2] {
    let (memory, pace) = (j.memory.unwrap_or(1), j.pace.unwrap_or(1.0));
    let why = "expected multiply-adds a second, at least 1".into();
    [
        (memory > 0, "job.memory", memory.to_string(), "expected MiB of a node, at least 1".into()),
        (pace >= 1.0 && pace.is_finite(), "job.pace", pace.to_string(), why),
    ]
}

fn at_most(key: &'static str, value: u32, most: u32) -> Rule {
    (value <= most, key, value.to_string(), format!("expected at most {most}"))
}

fn supervisor_rules(raw: &Raw) -> [Rule; 3] {
    let (text, count) = (&raw.run.listen, raw.recovery.supervisors);
    let listen = text.parse::<std::net::SocketAddr>();
    let why = "nodes must be able to reach it: expected the address of an interface";
    let majority = "expected 1, 3, 5 or 7: a majority of them must agree";
    [
        (listen.is_ok(), "run.listen", text.clone(), "expected ADDRESS:PORT, for example 127.0.0.1:0".into()),
        (listen.is_ok_and(|a| !a.ip().is_unspecified()), "run.listen", text.clone(), why.into()),
        (count % 2 == 1 && count <= 7, "recovery.supervisors", count.to_string(), majority.into()),
    ]
}

/// Values of which only some are possible.
fn choice_rules(raw: &Raw) -> Vec<Rule> {
    let (m, j, t) = (&raw.model, &raw.job, &raw.train);
    let mut rules: Vec<Rule> = Vec::new();
    let keep = raw.checkpoint.keep;
    let why = "expected at least 2: the job may go back to one while the next is made";
    rules.push((keep >= 2, "checkpoint.keep", keep.to_string(), why.into()));
    if let Some(store) = &raw.checkpoint.store {
        let known = store.strip_prefix("s3://").is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'));
        let secret = store.contains('@');
        // A secret is neither shown nor kept in a run's folder.
        let shown = if secret { "s3://…@…".to_owned() } else { store.clone() };
        let why = "expected s3://BUCKET or s3://BUCKET/PREFIX; keys come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)";
        rules.push((known && !secret, "checkpoint.store", shown, why.into()));
    }
    let known = super::precision(&t.precision).is_some();
    rules.push((known, "train.precision", t.precision.clone(), "expected fp32, bf16 or fp8".into()));
    rules.push((t.device == "cpu", "train.device", t.device.clone(), "this version trains on cpu".into()));
    rules.push((j.schedule == "1f1b", "job.schedule", j.schedule.clone(), "this version knows 1f1b".into()));
    rules.push((
        m.rope > 0 && m.rope.is_multiple_of(2),
        "model.rope",
        m.rope.to_string(),
        "rotated columns come in pairs: expected an even number above 0".into(),
    ));
    rules.push((
        m.dense_layers <= m.layers,
        "model.dense_layers",
        m.dense_layers.to_string(),
        format!("expected at most model.layers = {}", m.layers),
    ));
    rules.push((
        (j.stages as usize) <= m.layers,
        "job.stages",
        j.stages.to_string(),
        format!("expected at most model.layers = {}", m.layers),
    ));
    rules.push(at_most("recovery.mirrors", raw.recovery.mirrors, 15));
    let thin = &raw.recovery.when_thin;
    let known = ["go_on", "wait"].contains(&thin.as_str());
    rules.push((known, "recovery.when_thin", thin.clone(), "expected go_on or wait".into()));
    rules.push(at_most("recovery.spares", raw.recovery.spares, 1024));
    rules.push(at_most("job.lanes", j.lanes, 65_536));
    let batches: Vec<u32> = j.micro_batches.values().collect();
    rules.push((
        j.micro_batches.is_whole() && batches.iter().all(|n| (1..=65_536).contains(n)),
        "job.micro_batches",
        format!("{batches:?}"),
        "expected 1 to 65536, or [from step, value] pairs that ascend from step 0".into(),
    ));
    rules.push(at_most("job.shards", j.shards, 65_536));
    rules.push((m.initial_std.is_finite(), "model.initial_std", m.initial_std.to_string(), "expected a number".into()));
    rules.push((m.mtp <= 1, "model.mtp", m.mtp.to_string(), "expected 0 or 1, as published".into()));
    rules.push((
        m.mtp == 0 || m.sequence > 1,
        "model.sequence",
        m.sequence.to_string(),
        "model.mtp predicts the token after the next: expected at least 2".into(),
    ));
    if let Some(y) = &m.yarn {
        let why = "expected a factor of at least 1, an original length of at least 1, positive betas and scales";
        let finite = [y.factor, y.beta_fast, y.beta_slow, y.mscale, y.mscale_all_dim].iter().all(|x| x.is_finite());
        let positive = [y.beta_fast, y.beta_slow, y.mscale, y.mscale_all_dim].iter().all(|x| *x > 0.0);
        let holds = finite && y.factor >= 1.0 && y.original > 0 && positive;
        rules.push((holds, "model.yarn", format!("{y:?}"), why.into()));
    }
    rules.push((m.rope_theta >= 1.0, "model.rope_theta", m.rope_theta.to_string(), "expected at least 1".into()));
    rules
}

/// What must hold of the numbers of the optimizer.
fn optimizer_rules(o: &RawOptimizer) -> Vec<Rule> {
    let within = |key, value: f64, range: std::ops::RangeInclusive<f64>| {
        let reason = format!("expected {} to {}", range.start(), range.end());
        (range.contains(&value), key, value.to_string(), reason)
    };
    let below_one =
        |key, value: f64| ((0.0..1.0).contains(&value), key, value.to_string(), "expected 0 to below 1".into());
    let pieces = |key, pieces: &Pieces<f32>| {
        let values: Vec<f32> = pieces.values().collect();
        let holds = pieces.is_whole() && values.iter().all(|v| (0.0..=1.0).contains(v));
        let reason = "expected 0 to 1, or [from step, value] pairs that ascend from step 0";
        (holds, key, format!("{values:?}"), reason.to_owned())
    };
    vec![
        within("optimizer.lr", o.lr, 0.0..=1e3),
        within("optimizer.lr_end", o.lr_end, 0.0..=1e3),
        below_one("optimizer.beta1", o.beta1),
        below_one("optimizer.beta2", o.beta2),
        within("optimizer.eps", o.eps, 1e-30..=1.0),
        within("optimizer.weight_decay", o.weight_decay, 0.0..=1e3),
        // In the precision that it is used in.
        below_one("optimizer.ema", f64::from(o.ema.unwrap_or(0.0) as f32)),
        within("optimizer.clip", o.clip, 1e-30..=1e30),
        within("optimizer.balance_weight", f64::from(o.balance_weight), 0.0..=1.0),
        pieces("optimizer.bias_step", &o.bias_step),
        pieces("optimizer.mtp_weight", &o.mtp_weight),
        (
            o.tail_lr.is_none() || o.tail_steps.is_some(),
            "optimizer.tail_lr",
            format!("{:?}", o.tail_lr),
            "it is the learning rate of optimizer.tail_steps, which is not given".into(),
        ),
        within("optimizer.tail_lr", o.tail_lr.unwrap_or(0.0), 0.0..=1e3),
    ]
}

/// What must hold of a model with routed experts.
fn mixture_rules(m: &RawModel) -> Vec<Rule> {
    let groups = m.groups.max(1);
    vec![
        (m.experts > 0, "model.experts", m.experts.to_string(), "expected at least 1".into()),
        (m.expert_inner > 0, "model.expert_inner", m.expert_inner.to_string(), "expected at least 1".into()),
        (m.groups > 0, "model.groups", m.groups.to_string(), "expected at least 1".into()),
        (
            m.groups <= m.experts,
            "model.groups",
            m.groups.to_string(),
            format!("more groups than model.experts = {}", m.experts),
        ),
        (
            m.experts.is_multiple_of(groups),
            "model.groups",
            m.groups.to_string(),
            format!("model.experts = {} does not divide into so many groups", m.experts),
        ),
        (
            m.groups_kept > 0 && m.groups_kept <= m.groups,
            "model.groups_kept",
            m.groups_kept.to_string(),
            format!("expected 1 to model.groups = {}", m.groups),
        ),
        (
            m.top_k > 0 && m.top_k <= m.experts / groups * m.groups_kept,
            "model.top_k",
            m.top_k.to_string(),
            format!("expected 1 to {}, the experts of the kept groups", m.experts / groups * m.groups_kept),
        ),
    ]
}

/// What must hold of the text.
fn data_rules(d: &RawData, raw: &Raw) -> Vec<Rule> {
    let weights: Vec<f64> = d.sources.iter().map(|s| s.weight).collect();
    let whole = d.sources.iter().all(|s| !s.paths.is_empty());
    let mut rules: Vec<Rule> = vec![
        (
            d.sources.is_empty() || d.paths.is_none(),
            "data.paths",
            format!("{:?}", d.paths),
            "data.sources are given too: expected one of both".into(),
        ),
        (
            d.paths.as_ref().is_none_or(|p| !p.is_empty()) && whole,
            "data.paths",
            "[]".into(),
            "expected at least one file or folder".into(),
        ),
        (
            weights.iter().all(|w| w.is_finite() && *w > 0.0) && weights.len() <= 1024,
            "data.sources",
            format!("{weights:?}"),
            "expected at most 1024 sources with weights above 0".into(),
        ),
        (
            d.tokenizer.is_none() || raw.model.vocabulary.is_some(),
            "data.tokenizer",
            format!("{:?}", d.tokenizer),
            "expected model.vocabulary too: at least the tokenizer's size".into(),
        ),
        (
            raw.model.vocabulary.is_none_or(|v| v >= 256 || d.tokenizer.is_some()),
            "model.vocabulary",
            format!("{:?}", raw.model.vocabulary),
            "text is read as bytes: expected at least 256".into(),
        ),
    ];
    if let Some(e) = &d.eval {
        let every = raw.checkpoint.every;
        rules.push((
            e.every > 0 && e.every.is_multiple_of(every),
            "data.eval.every",
            e.every.to_string(),
            format!("checkpoints are looked at: expected a multiple of checkpoint.every = {every}"),
        ));
        let positive = e.sequences > 0 && !e.paths.is_empty();
        let why = "expected at least one sequence of at least one file or folder";
        rules.push((positive, "data.eval.sequences", e.sequences.to_string(), why.into()));
    }
    rules
}
