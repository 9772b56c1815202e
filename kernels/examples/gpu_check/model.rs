//! A model made of the backend's operations beside the same on the CPU: losses, gradients, logits.

use crate::backend::{Both, Results};
use crate::random;
use everstep_kernels::{
    Backend, BackendError, Decoder, ExpertWeights, ModelConfig, ParameterMap, Precision, Progress, RowsRecipe, Scales,
    StageInput, StageModel, Tensor, Update, expert_backward_input, expert_backward_weight, expert_forward,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Some thousand roundings to BF16 on the way, one after another; and gradients that are small beside their terms. In FP8 a number
/// that was rounded otherwise may have another code, an eighth away.
fn models(precision: Precision, name: &str, _: usize) -> f64 {
    match (name, precision) {
        ("losses", _) => 1e-3,
        (_, Precision::Fp8) => 0.2,
        _ => 5e-2,
    }
}

fn config(large: bool) -> ModelConfig {
    let of = |small: usize, big: usize| if large { big } else { small };
    ModelConfig {
        vocabulary: of(11, 1000),
        hidden: of(8, 256),
        layers: 3,
        dense_layers: 1,
        dense_inner: of(12, 520),
        heads: of(2, 4),
        query_rank: Some(of(5, 96)),
        kv_rank: of(4, 64),
        nope: of(4, 32),
        rope: of(2, 16),
        value: of(3, 32),
        experts: of(4, 16),
        shared_experts: 1,
        expert_inner: of(6, 64),
        top_k: of(2, 4),
        groups: of(2, 4),
        groups_kept: of(1, 2),
        routed_scale: 2.5,
        sequence: of(5, 128),
        rope_theta: 10_000.0,
        yarn: None,
        mtp: 1,
        initial_std: if large { 0.05 } else { 0.3 },
    }
}

fn parameters(c: &ModelConfig) -> ParameterMap {
    let value = |(i, p): (usize, everstep_kernels::Parameter)| {
        let values = match p.update {
            Update::Decayed => p.initial(5, c.initial_std),
            Update::Plain => random(1, p.len(), i as u32).iter().map(|x| 1.0 + 0.2 * x).collect(),
            Update::Balance => random(1, p.len(), i as u32).iter().map(|x| 0.1 * x).collect(),
        };
        (p.name, Tensor::from_vec(p.rows, p.columns, values))
    };
    c.parameters().into_iter().enumerate().map(value).collect()
}

/// Rows for experts as they were sent, or for the second micro-batch as they are made again.
fn perhaps_again(b: &dyn Backend, micro_batch: u32, rows: Vec<Tensor>, recipe: &RowsRecipe) -> Vec<Tensor> {
    match micro_batch {
        0 => rows,
        _ => (0..rows.len() as u32).map(|expert| recipe.rows(b, expert)).collect(),
    }
}

/// Two micro-batches through a whole model and back: losses and all gradients. Then logits by the cache.
fn model(b: &dyn Backend, c: &ModelConfig, map: &ParameterMap) -> Result<Results, BackendError> {
    let scales = Scales { loss: 0.01, mtp: 0.003, balance: 0.002 };
    let mut stage = StageModel::new(Arc::new(c.clone()), 0..c.layers, map, scales);
    let experts = |layer: u32| (0..c.experts as u32).map(move |e| ExpertWeights::new(map, layer, e));
    let (mut saved, mut results) = (BTreeMap::new(), Results::new());
    for m in 0..2u32 {
        let tokens: Vec<u32> = (0..2 * c.sequence as u32).map(|n| (n * n + m) % c.vocabulary as u32).collect();
        let targets = tokens[1..].iter().copied().chain([7]).collect();
        let mut progress = stage.forward(b, m, StageInput::Tokens(tokens), Some(targets));
        while let Progress::Experts { layer, rows, recipe } = progress {
            let rows = perhaps_again(b, m, rows, &recipe);
            let made = expert_forward(b, experts(layer).zip(rows).collect());
            let (y, keep): (Vec<_>, Vec<_>) = made.into_iter().unzip();
            saved.insert(layer, keep);
            progress = stage.resume_forward(b, m, y);
        }
        let mut progress = stage.backward_input(b, m, None);
        while let Progress::Experts { layer, rows, recipe } = progress {
            let rows = perhaps_again(b, m, rows, &recipe);
            let items = saved.remove(&layer).expect("they were saved").into_iter().zip(rows);
            let made = expert_backward_input(b, experts(layer).zip(items).collect());
            let (dx, held): (Vec<_>, Vec<_>) = made.into_iter().unzip();
            for (weights, held) in experts(layer).zip(held) {
                let made = expert_backward_weight(b, &weights, &[held]);
                results.extend(made.into_iter().map(|(name, gradient)| (format!("{name} of {m}"), gradient)));
            }
            progress = stage.resume_backward(b, m, dx);
        }
        stage.weight(b, m);
    }
    let sums = stage.take_sums();
    results.extend(sums.gradients.into_iter().map(|(name, gradient)| (name.to_string(), gradient)));
    let losses = sums.losses.iter().flat_map(|loss| [*loss as f32, (*loss - f64::from(*loss as f32)) as f32]);
    results.push(("losses".to_owned(), Tensor::from_vec(2, 2, losses.collect())));
    let mut decoder = Decoder::new(Arc::new(c.clone()), map);
    for tokens in [&[1u32, 4, 10][..], &[0], &[3]] {
        results.push((format!("logits after {}", decoder.positions()), decoder.feed(b, tokens)?));
    }
    Ok(results)
}

/// Models, of which the larger fills some tiles.
pub(crate) fn all(both: Both<'_>) -> Result<bool, BackendError> {
    let (mut good, low) = (true, both.precision.is_low());
    // The sums of the small one are too short for what is rounded to BF16 to be small beside them.
    let models_of = if low { &[true][..] } else { &[false, true] };
    for large in models_of {
        let mut c = config(*large);
        if low {
            // Every expert is chosen: what is rounded otherwise may be chosen otherwise.
            (c.top_k, c.groups_kept) = (c.experts, c.groups);
        }
        let map = parameters(&c);
        let what = if *large { "a larger model" } else { "a model" };
        good &= both.compare(what, models, |b| model(b, &c, &map))?;
    }
    Ok(good)
}
