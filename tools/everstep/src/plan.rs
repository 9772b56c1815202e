//! `everstep plan`: what a configuration needs, without training.

use crate::hf::inventory::{self, Precision};
use anyhow::Result;
use everstep_actors::{Config, Limit, Outlook};
use everstep_kernels::{Group, ModelConfig, Parameter, Update};
use serde_json::json;
use std::io::{BufWriter, Write};
use std::process::ExitCode;

/// Multiply-adds count twice; backward costs twice a forward.
const PASSES: u64 = 6;

/// Parameters in all, and those that one token meets.
fn parameters(model: &ModelConfig) -> (u64, u64) {
    let size = |g: Group| model.parameters_of(g).iter().map(|p| Parameter::len(p) as u64).sum::<u64>();
    let (mut all, mut active) = (0, 0);
    for group in model.groups_of_model() {
        let size = size(group);
        all += size;
        active += match group {
            // A row of it is looked up.
            Group::Embedding => 0,
            Group::Expert { .. } => size * model.top_k as u64 / model.experts as u64,
            Group::Layer(_) => size,
            // The module of multi-token prediction uses the head once more.
            Group::Head => size * (1 + model.mtp as u64),
        };
    }
    (all, active)
}

/// Operations of a token's forward and backward pass: matrices, and causal attention over half a sequence.
fn flops_per_token(model: &ModelConfig, active: u64) -> u64 {
    let heads = model.heads * (model.nope + model.rope + model.value);
    PASSES * active + PASSES * (model.blocks() * heads * model.sequence / 2) as u64
}

pub(crate) fn run(config: &Config, inventory: Option<Precision>, json: bool) -> Result<ExitCode> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    match inventory {
        Some(precision) => list(&config.spec.model, precision, json, &mut out)?,
        None => summary(config, json, &mut out)?,
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// What the number of nodes means that may be lost at one time.
fn losses(outlook: &Outlook) -> &'static str {
    match outlook.limit {
        Limit::Copies => {
            "nodes may be lost at one time, whichever, without waiting; of one more, a shard may have no copy left"
        }
        Limit::Room if outlook.fullest.is_none() => "nodes may be lost: there is not room for the job on all of them",
        Limit::Room => {
            "nodes may be lost at one time, whichever, without waiting; of one more, there may not be room for what it had"
        }
        Limit::Nodes => "nodes may be lost at one time, whichever, without waiting; then none is left",
        Limit::Cases => "nodes may be lost at one time, whichever, without waiting; more were not tried",
    }
}

fn list(model: &ModelConfig, precision: Precision, json: bool, out: &mut impl Write) -> Result<()> {
    let (mut count, mut bytes) = (0u64, 0u64);
    for entry in inventory::of(model, precision) {
        count += 1;
        bytes += entry.bytes() as u64;
        let dtype = format!("{:?}", entry.form.dtype());
        if json {
            let line = json!({ "tensor": entry.name, "shape": entry.shape, "type": dtype, "bytes": entry.bytes() });
            writeln!(out, "{line}")?;
        } else {
            writeln!(out, "{} {:?} {dtype} {}", entry.name, entry.shape, entry.bytes())?;
        }
    }
    if !json {
        writeln!(out, "{count} tensors, {bytes} bytes")?;
    }
    Ok(())
}

fn summary(config: &Config, json: bool, out: &mut impl Write) -> Result<()> {
    let spec = &config.spec;
    let (all, active) = parameters(&spec.model);
    let flops = flops_per_token(&spec.model, active);
    let copies = u64::from(spec.mirrors) + 1;
    // Of even numbers of elements, two of BF16 are a word.
    let state = spec.parts().iter().map(|part| 2 * part.count(2) as u64 * all).sum::<u64>();
    let gates = spec.model.parameters().iter().filter(|p| p.update == Update::Balance).count();
    let outlook = Outlook::new(spec, config.nodes, config.memory.unwrap_or(0));
    let mut lines = vec![
        ("parameters", all, "in all"),
        ("active", active, "parameters that one token meets"),
        ("mixture_layers", gates as u64, "layers with routed experts"),
        ("flops_per_token", flops, "operations of a token, forward and backward"),
        ("tokens_per_step", spec.targets_of_step(spec.steps), "tokens of a step at the end"),
        ("state_bytes", state * copies, "bytes of weights, moments and averages, mirrors among them"),
        ("shard_bytes", state / u64::from(spec.shards), "bytes of a shard of them"),
        ("checkpoint_bytes", state, "bytes of a checkpoint"),
    ];
    let of_node = |bytes| ("node_bytes", bytes, "bytes of all that lives on the fullest node, at most");
    let [copies, recipes] = outlook.outboxes;
    let of_copies = "bytes of copies that all outboxes keep until the commit: sums, and what goes from stage to stage";
    lines.push(("outbox_bytes", copies + recipes, "bytes that all outboxes keep until the commit, at most"));
    lines.push(("copy_bytes", copies, of_copies));
    lines.push((
        "recipe_bytes",
        recipes,
        "bytes of which rows for experts are made again; answers are made of those rows",
    ));
    lines.extend(outlook.fullest.map(of_node));
    lines.push(("process_bytes", outlook.process, "bytes of its process beside them, at most"));
    lines.push(("losses", outlook.losses as u64, losses(&outlook)));
    for (key, value, words) in lines {
        if json {
            writeln!(out, "{}", json!({ "key": key, "value": value }))?;
        } else {
            writeln!(out, "{value:>20}  {words}")?;
        }
    }
    Ok(())
}
