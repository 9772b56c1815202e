//! The whole model once more, in f64 and plain loops, and the layers held against it: losses directly,
//! every parameter's gradient by central differences.

use super::ParameterMap;
use super::decode::Decoder;
use super::expert::{ExpertWeights, expert_backward_input, expert_backward_weight, expert_forward};
use super::second_use;
use super::stage::{Progress, Scales, StageInput, StageModel};
use crate::cpu::CpuBackend;
use crate::model::{Group, ModelConfig, Update};
use crate::ops::rope::Yarn;
use crate::ops::testing::random;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

fn config(query_rank: Option<usize>) -> ModelConfig {
    ModelConfig {
        vocabulary: 11,
        hidden: 8,
        layers: 3,
        dense_layers: 1,
        dense_inner: 12,
        heads: 2,
        query_rank,
        kv_rank: 4,
        nope: 4,
        rope: 2,
        value: 3,
        experts: 4,
        shared_experts: 1,
        expert_inner: 6,
        top_k: 2,
        groups: 2,
        groups_kept: 1,
        routed_scale: 2.5,
        sequence: 5,
        rope_theta: 10_000.0,
        yarn: None,
        mtp: 0,
        initial_std: 0.3,
    }
}

const SCALES: Scales = Scales { loss: 1.0, mtp: 0.3, balance: 0.2 };

type Wide = BTreeMap<Arc<str>, Vec<f64>>;

struct Reference<'a> {
    c: &'a ModelConfig,
    p: &'a Wide,
}

impl Reference<'_> {
    fn w(&self, name: &str) -> &[f64] {
        &self.p[name]
    }

    fn linear(&self, x: &[f64], name: &str) -> Vec<f64> {
        self.w(name).chunks_exact(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let r = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).sqrt();
        x.iter().zip(self.w(name)).map(|(x, w)| x / r * w).collect()
    }

    fn rope(&self, x: &mut [f64], position: usize) {
        let n = x.len();
        for i in 0..n / 2 {
            let mut angle = position as f64 / self.c.rope_theta.powf(2.0 * i as f64 / n as f64);
            // With a text so short before, the first pair stays and the others are stretched whole.
            angle /= self.c.yarn.filter(|_| i > 0).map_or(1.0, |y| y.factor);
            let (a, b) = (x[2 * i], x[2 * i + 1]);
            x[2 * i] = a * angle.cos() - b * angle.sin();
            x[2 * i + 1] = a * angle.sin() + b * angle.cos();
        }
    }

    fn mlp(&self, x: &[f64], prefix: &str) -> Vec<f64> {
        let (g, u) =
            (self.linear(x, &format!("{prefix}gate_proj.weight")), self.linear(x, &format!("{prefix}up_proj.weight")));
        let h: Vec<f64> = g.iter().zip(u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        self.linear(&h, &format!("{prefix}down_proj.weight"))
    }

    fn attention(&self, hs: &[Vec<f64>], at: &str) -> Vec<Vec<f64>> {
        let c = self.c;
        let name = |n: &str| format!("{at}{n}");
        let (mut qs, mut kvs, mut ropes) = (Vec::new(), Vec::new(), Vec::new());
        for (t, h) in hs.iter().enumerate() {
            let x = self.norm(h, &name("input_layernorm.weight"));
            let mut q = if c.query_rank.is_some() {
                let low = self.linear(&x, &name("self_attn.q_a_proj.weight"));
                self.linear(
                    &self.norm(&low, &name("self_attn.q_a_layernorm.weight")),
                    &name("self_attn.q_b_proj.weight"),
                )
            } else {
                self.linear(&x, &name("self_attn.q_proj.weight"))
            };
            q.chunks_exact_mut(c.nope + c.rope).for_each(|q| self.rope(&mut q[c.nope..], t % c.sequence));
            let mut kv = self.linear(&x, &name("self_attn.kv_a_proj_with_mqa.weight"));
            let mut k_rope = kv.split_off(c.kv_rank);
            self.rope(&mut k_rope, t % c.sequence);
            let latent = self.norm(&kv, &name("self_attn.kv_a_layernorm.weight"));
            qs.push(q);
            kvs.push(self.linear(&latent, &name("self_attn.kv_b_proj.weight")));
            ropes.push(k_rope);
        }
        let growth = c.yarn.map_or(1.0, |y| 1.0 + 0.1 * y.factor.ln());
        let scale = ((c.nope + c.rope) as f64).powf(-0.5) * growth * growth;
        (0..hs.len())
            .map(|t| {
                let mut o = Vec::new();
                for head in 0..c.heads {
                    let q = &qs[t][head * (c.nope + c.rope)..];
                    let first = t / c.sequence * c.sequence;
                    let kv = |u: usize| &kvs[u][head * (c.nope + c.value)..];
                    let weights: Vec<f64> = (first..=t)
                        .map(|u| {
                            let nope: f64 = (0..c.nope).map(|i| q[i] * kv(u)[i]).sum();
                            let rope: f64 = (0..c.rope).map(|i| q[c.nope + i] * ropes[u][i]).sum();
                            ((nope + rope) * scale).exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    for v in 0..c.value {
                        o.push((first..=t).map(|u| weights[u - first] / total * kv(u)[c.nope + v]).sum());
                    }
                }
                let y = self.linear(&o, &name("self_attn.o_proj.weight"));
                hs[t].iter().zip(y).map(|(h, y)| h + y).collect()
            })
            .collect()
    }

    fn feed_forward(&self, h: &[f64], layer: usize) -> Vec<f64> {
        let at = format!("model.layers.{layer}.");
        let x = self.norm(h, &format!("{at}post_attention_layernorm.weight"));
        let mut y = vec![0.0; h.len()];
        let mut add = |scale: f64, part: Vec<f64>| y.iter_mut().zip(part).for_each(|(y, p)| *y += scale * p);
        if self.c.is_mixture(layer) {
            add(1.0, self.mlp(&x, &format!("{at}mlp.shared_experts.")));
            let scores: Vec<f64> =
                self.linear(&x, &format!("{at}mlp.gate.weight")).iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
            let bias = self.w(&format!("{at}mlp.gate.e_score_correction_bias"));
            let c: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
            // With two experts in each of two groups, one kept: the better pair.
            let kept = if c[0] + c[1] >= c[2] + c[3] { [0, 1] } else { [2, 3] };
            let total: f64 = kept.iter().map(|e| scores[*e]).sum();
            for e in kept {
                add(scores[e] / total * f64::from(self.c.routed_scale), self.mlp(&x, &format!("{at}mlp.experts.{e}.")));
            }
        } else {
            add(1.0, self.mlp(&x, &format!("{at}mlp.")));
        }
        h.iter().zip(y).map(|(h, y)| h + y).collect()
    }

    /// A block, and its balance loss: per sequence `T` times `sum f_i P_i`.
    fn block(&self, hs: Vec<Vec<f64>>, layer: usize) -> (Vec<Vec<f64>>, f64) {
        let (c, at) = (self.c, format!("model.layers.{layer}."));
        let hs = self.attention(&hs, &at);
        let mut balance = 0.0;
        for sequence in hs.chunks(c.sequence).filter(|_| c.is_mixture(layer)) {
            let scores = |h: &Vec<f64>| -> Vec<f64> {
                let x = self.norm(h, &format!("{at}post_attention_layernorm.weight"));
                self.linear(&x, &format!("{at}mlp.gate.weight")).iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect()
            };
            let rows: Vec<Vec<f64>> = sequence.iter().map(scores).collect();
            for e in 0..c.experts {
                let chosen = |s: &&Vec<f64>| s.iter().filter(|x| **x > s[e]).count() < c.top_k;
                let f = rows.iter().filter(chosen).count() as f64 * c.experts as f64 / c.top_k as f64;
                let p: f64 = rows.iter().map(|s| s[e] / s.iter().sum::<f64>()).sum();
                balance += f * p / c.sequence as f64;
            }
        }
        (hs.iter().map(|h| self.feed_forward(h, layer)).collect(), balance)
    }

    fn cross_entropy(&self, x: &[f64], target: u32) -> f64 {
        let logits = self.linear(x, "lm_head.weight");
        logits.iter().map(|l| l.exp()).sum::<f64>().ln() - logits[target as usize]
    }

    fn embed(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let d = self.c.hidden;
        tokens.iter().map(|t| self.w("model.embed_tokens.weight")[*t as usize * d..][..d].to_vec()).collect()
    }

    /// Losses of the main model and of multi-token prediction, and the balance loss.
    fn losses(&self, tokens: &[u32], targets: &[u32]) -> [f64; 3] {
        let (mut hs, mut losses) = (self.embed(tokens), [0.0; 3]);
        for layer in 0..self.c.layers {
            let (out, balance) = self.block(hs, layer);
            (hs, losses[2]) = (out, losses[2] + balance);
        }
        let xs: Vec<Vec<f64>> = hs.iter().map(|h| self.norm(h, "model.norm.weight")).collect();
        losses[0] = xs.iter().zip(targets).map(|(x, t)| self.cross_entropy(x, *t)).sum();
        if self.c.mtp == 1 {
            let at = |name: &str| format!("model.layers.{}.{name}", self.c.layers);
            let joined = self.embed(targets).into_iter().zip(&xs).map(|(e, x)| {
                let both = [self.norm(&e, &at("enorm.weight")), self.norm(x, &at("hnorm.weight"))].concat();
                self.linear(&both, &at("eh_proj.weight"))
            });
            let (hs, balance) = self.block(joined.collect(), self.c.layers);
            losses[2] += balance;
            for (i, h) in hs.iter().enumerate().filter(|(i, _)| (i + 1) % self.c.sequence != 0) {
                losses[1] += self.cross_entropy(&self.norm(h, &at("shared_head.norm.weight")), targets[i + 1]);
            }
        }
        losses
    }

    /// What is differentiated.
    fn loss(&self, tokens: &[u32], targets: &[u32]) -> f64 {
        let [main, mtp, balance] = self.losses(tokens, targets);
        main * f64::from(SCALES.loss) + mtp * f64::from(SCALES.mtp) + balance * f64::from(SCALES.balance)
    }
}

fn parameters(c: &ModelConfig) -> ParameterMap {
    let value = |(i, p): (usize, crate::model::Parameter)| {
        let values = match p.update {
            Update::Decayed => p.initial(5, c.initial_std),
            Update::Plain => random(p.len(), i as u32).iter().map(|x| 1.0 + 0.2 * x).collect(),
            Update::Balance => random(p.len(), i as u32).iter().map(|x| 0.1 * x).collect(),
        };
        (p.name, Tensor::from_vec(p.rows, p.columns, values))
    };
    c.parameters().into_iter().enumerate().map(value).collect()
}

/// Runs stages with all experts at hand, a micro-batch so many times. Gives the sums of losses and of gradients, uses
/// apart; of an expert, its last gradient.
fn train(
    c: &ModelConfig,
    map: &ParameterMap,
    cuts: &[usize],
    times: u32,
    (tokens, targets): (&[u32], &[u32]),
) -> ([f64; 2], ParameterMap) {
    let b = &CpuBackend::FP32;
    let shared = Arc::new(c.clone());
    let mut stages: Vec<StageModel> =
        cuts.windows(2).map(|w| StageModel::new(Arc::clone(&shared), w[0]..w[1], map, SCALES)).collect();
    let experts = |layer: u32| (0..c.experts as u32).map(move |e| ExpertWeights::new(map, layer, e));
    let (mut saved, mut gradients) = (BTreeMap::new(), ParameterMap::new());
    let last = stages.len() - 1;
    for m in 0..times {
        let mut input = StageInput::Tokens(tokens.to_vec());
        for (s, stage) in stages.iter_mut().enumerate() {
            let targets = (s == last).then(|| targets.to_vec());
            let mut progress = stage.forward(b, m, input.clone(), targets);
            while let Progress::Experts { layer, rows, .. } = progress {
                let (y, keep): (Vec<_>, Vec<_>) =
                    expert_forward(b, experts(layer).zip(rows).collect()).into_iter().unzip();
                saved.insert(layer, keep);
                progress = stage.resume_forward(b, m, y);
            }
            if let Progress::Hidden(h) = progress {
                input = StageInput::Hidden(h);
            }
        }
        let mut gradient = None;
        for (s, stage) in stages.iter_mut().enumerate().rev() {
            let mut progress = stage.backward_input(b, m, gradient.take());
            while let Progress::Experts { layer, rows, .. } = progress {
                if s == 0 {
                    let made = stage.weight_so_far(b, m);
                    assert!(matches!(made, Progress::Waits { layer: of } if of == layer), "{made:?}");
                }
                let items = saved.remove(&layer).unwrap().into_iter().zip(rows);
                let (dx, held): (Vec<_>, Vec<_>) =
                    expert_backward_input(b, experts(layer).zip(items).collect()).into_iter().unzip();
                for (weights, held) in experts(layer).zip(held) {
                    gradients.extend(expert_backward_weight(b, &weights, &[held]));
                }
                progress = stage.resume_backward(b, m, dx);
            }
            if let Progress::Hidden(h) = progress {
                gradient = Some(h);
            }
            stage.weight(b, m);
        }
    }
    let sums: Vec<_> = stages.iter_mut().map(StageModel::take_sums).collect();
    let losses = sums.last().expect("at least one stage").losses;
    gradients.extend(sums.into_iter().flat_map(|s| s.gradients));
    (losses, gradients)
}

#[test]
fn losses_and_all_gradients_agree_with_the_f64_model() {
    let (tokens, targets) = ([1, 4, 10, 0, 3, 7, 7, 2, 9, 5], [4, 10, 0, 3, 6, 7, 2, 9, 5, 1]);
    let yarn = Yarn { factor: 3.0, original: 6, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0 };
    let dense = ModelConfig { dense_layers: 3, ..config(None) };
    let mtp = ModelConfig { mtp: 1, ..config(Some(5)) };
    for c in [config(None), ModelConfig { yarn: Some(yarn), rope: 4, ..config(Some(5)) }, dense, mtp] {
        let map = parameters(&c);
        let mut wide: Wide =
            map.iter().map(|(n, t)| (n.clone(), t.f32s().iter().map(|x| f64::from(*x)).collect())).collect();
        let (losses, gradients) = train(&c, &map, &[0, 2, 3], 1, (&tokens, &targets));
        let exact = Reference { c: &c, p: &wide }.losses(&tokens, &targets);
        for (loss, exact) in losses.iter().zip(exact) {
            assert!((loss - exact).abs() <= 1e-5 * exact, "{loss} against {exact}");
        }
        for p in c.parameters().iter().filter(|p| p.update != Update::Balance) {
            let mut got = gradients[&p.name].f32s().to_vec();
            if let Some(second) = gradients.get(&second_use(&p.name)) {
                got.iter_mut().zip(second.f32s()).for_each(|(a, b)| *a += b);
            }
            let scale = got.iter().fold(1e-3f32, |m, g| m.max(g.abs()));
            // Every seventh element: enough to meet every row and column of these small matrices.
            for i in (0..p.len()).step_by(7) {
                let keep = wide[&p.name][i];
                let mut at = |x: f64| {
                    wide.get_mut(&p.name).unwrap()[i] = x;
                    Reference { c: &c, p: &wide }.loss(&tokens, &targets)
                };
                let want = (at(keep + 1e-5) - at(keep - 1e-5)) / 2e-5;
                at(keep);
                // f32 through three layers: 1e-4 of the largest gradient is some 1,000 roundings.
                let error = (f64::from(got[i]) - want).abs() / f64::from(scale);
                assert!(error < 1e-4, "{} [{i}]: {} against {want}", p.name, got[i]);
            }
        }
    }
}

/// Nor on when weight products are made: the first stage makes them while it waits, the others at the end.
#[test]
fn bits_do_not_depend_on_stages_or_on_other_sequences() {
    let c = ModelConfig { mtp: 1, ..config(Some(5)) };
    let map = parameters(&c);
    let (tokens, targets) = ([1, 4, 10, 0, 3], [4, 10, 0, 3, 6]);
    let (losses, whole) = train(&c, &map, &[0, 3], 2, (&tokens, &targets));
    for cuts in [&[0, 1, 3][..], &[0, 1, 2, 3]] {
        let (other, parts) = train(&c, &map, cuts, 2, (&tokens, &targets));
        assert_eq!(other.map(f64::to_bits), losses.map(f64::to_bits));
        for (name, tensor) in &whole {
            assert_eq!(tensor.f32s(), parts[name].f32s(), "{name}");
        }
    }
}

#[test]
fn a_batch_of_experts_gives_the_bits_of_each_alone() {
    let c = config(None);
    let map = parameters(&c);
    let b = &CpuBackend::FP32;
    let items: Vec<(ExpertWeights, Tensor)> = [3usize, 0, 1, 17]
        .iter()
        .enumerate()
        .map(|(e, rows)| {
            (ExpertWeights::new(&map, 1, e as u32), Tensor::from_vec(*rows, 8, random(rows * 8, e as u32)))
        })
        .collect();
    let all = expert_forward(b, items.clone());
    for (item, (y, saved)) in items.into_iter().zip(all) {
        let dy = Tensor::from_vec(y.rows(), 8, random(y.rows() * 8, 50));
        let alone = expert_forward(b, vec![item.clone()]).remove(0);
        assert_eq!(alone.0.f32s(), y.f32s());
        let (dx, held) = expert_backward_input(b, vec![(item.0.clone(), (saved, dy))]).remove(0);
        assert_eq!(dx.rows(), y.rows());
        let sums = expert_backward_weight(b, &item.0, &[held]);
        assert_eq!(sums.len(), 3);
    }
    assert_eq!(c.groups_of_model().iter().filter(|g| matches!(g, Group::Expert { .. })).count(), 8);
}

/// The cache changes nothing but the order of sums: logits of a text that comes in parts.
#[test]
fn a_decoder_gives_the_logits_of_the_whole_text() {
    let yarn = Yarn { factor: 3.0, original: 6, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0 };
    for c in [config(None), ModelConfig { yarn: Some(yarn), rope: 4, mtp: 1, ..config(Some(5)) }] {
        let map = parameters(&c);
        let tokens = [1, 4, 10, 0, 3];
        let wide: Wide =
            map.iter().map(|(n, t)| (n.clone(), t.f32s().iter().map(|x| f64::from(*x)).collect())).collect();
        let reference = Reference { c: &c, p: &wide };
        let mut hs = reference.embed(&tokens);
        for layer in 0..c.layers {
            hs = reference.block(hs, layer).0;
        }
        let exact = |h: &Vec<f64>| reference.linear(&reference.norm(h, "model.norm.weight"), "lm_head.weight");
        let want: Vec<f64> = hs.iter().flat_map(exact).collect();
        for parts in [&[5][..], &[1, 1, 1, 1, 1], &[2, 3]] {
            let mut decoder = Decoder::new(Arc::new(c.clone()), &map);
            let mut got = Vec::new();
            for n in parts {
                let from = decoder.positions();
                got.extend(decoder.feed(&CpuBackend::FP32, &tokens[from..from + n]).unwrap().f32s().to_vec());
            }
            crate::ops::testing::assert_close(&got, &want, 1e-5, "logits");
        }
    }
}
