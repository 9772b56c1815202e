//! A sample of what a trained model writes, from its newest checkpoint, in this process.

use crate::fingerprint::tensors;
use anyhow::{Context, Result};
use everstep_actors::{Layout, RunFolder};
use everstep_kernels::{
    Backend, CpuBackend, ExpertWeights, ModelConfig, ParameterMap, Philox, Progress, Scales, StageInput, StageModel,
    Tensor, expert_forward,
};
use std::sync::Arc;

const PURPOSE_SAMPLE: u32 = 3;
/// Nothing is trained here.
const NO_LOSS: Scales = Scales { loss: 0.0, mtp: 0.0, balance: 0.0 };
const PROMPT: &str = "//! ";

/// `length` bytes after a short prompt. The same checkpoint gives the same text.
pub(crate) fn text(run: &RunFolder, length: usize) -> Result<String> {
    let (config, step, tensors) = tensors(run, None)?;
    let layout = Layout::new(&config.spec);
    let map: ParameterMap = layout
        .parameters
        .iter()
        .zip(tensors)
        .map(|(p, t)| (p.name.clone(), Tensor::host(t.rows, t.columns, Arc::clone(&t.data[0]))))
        .collect();
    let random = Philox::new(config.spec.seed, PURPOSE_SAMPLE, 0);
    let mut bytes = PROMPT.as_bytes().to_vec();
    for n in 0..length {
        let from = bytes.len().saturating_sub(config.spec.model.sequence);
        let logits = logits(&config.spec.model, &map, &bytes[from..])?;
        bytes.push(choose(&logits, random.uniform(n as u64)));
    }
    Ok(format!("sample of step {step}:\n{}", String::from_utf8_lossy(&bytes)))
}

/// The last position's logits for a text of at most one sequence.
fn logits(model: &ModelConfig, map: &ParameterMap, text: &[u8]) -> Result<Vec<f32>> {
    let b = &CpuBackend;
    let config = Arc::new(ModelConfig { sequence: text.len(), ..model.clone() });
    let mut stage = StageModel::new(Arc::clone(&config), 0..config.layers, map, NO_LOSS);
    let tokens = text.iter().map(|b| u32::from(*b)).collect();
    let mut progress = stage.forward(b, 0, StageInput::Tokens(tokens), None);
    loop {
        match progress {
            Progress::Experts { layer, rows } => {
                let weights = |e: usize| ExpertWeights::new(map, layer, e as u32);
                let items = rows.into_iter().enumerate().map(|(e, rows)| (weights(e), rows)).collect();
                let rows = expert_forward(b, items).into_iter().map(|(y, _)| y).collect();
                progress = stage.resume_forward(b, 0, rows);
            }
            Progress::Hidden(logits) => {
                let all = b.read(&logits)?;
                return all
                    .chunks_exact(model.vocabulary)
                    .next_back()
                    .map(<[f32]>::to_vec)
                    .context("a text of no bytes");
            }
            Progress::Finished => anyhow::bail!("a model without targets gives logits"),
        }
    }
}

/// Draws a byte with temperature 0.7.
fn choose(logits: &[f32], uniform: f64) -> u8 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let weights: Vec<f64> = logits.iter().map(|x| (f64::from(x - max) / 0.7).exp()).collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    for (byte, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return byte as u8;
        }
    }
    0
}
