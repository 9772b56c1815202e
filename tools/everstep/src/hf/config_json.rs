//! config.json: a model's sizes under the names of `transformers` (DeepseekV3Config).

use anyhow::{Result, bail};
use everstep_kernels::{ModelConfig, Yarn};
use serde_json::{Map, Value, json};

/// What our models always have, by key; another value in a file is a model that we do not train.
fn fixed() -> [(&'static str, Value); 7] {
    [
        ("hidden_act", json!("silu")),
        ("rms_norm_eps", json!(1e-6)),
        ("attention_bias", json!(false)),
        ("tie_word_embeddings", json!(false)),
        ("norm_topk_prob", json!(true)),
        ("rope_interleave", json!(true)),
        ("scoring_func", json!("sigmoid")),
    ]
}

/// Sizes by key, in the order of the file. A dense model has no routed experts to describe: all its
/// layers are replaced by dense ones.
fn sizes(m: &ModelConfig) -> Vec<(&'static str, Value)> {
    let mixture = m.dense_layers < m.layers;
    let or_one = |n: usize| if mixture { n } else { 1 };
    vec![
        ("vocab_size", json!(m.vocabulary)),
        ("hidden_size", json!(m.hidden)),
        ("intermediate_size", json!(m.dense_inner.max(1))),
        ("moe_intermediate_size", json!(or_one(m.expert_inner))),
        ("num_hidden_layers", json!(m.layers)),
        ("first_k_dense_replace", json!(m.dense_layers)),
        ("num_attention_heads", json!(m.heads)),
        ("num_key_value_heads", json!(m.heads)),
        ("q_lora_rank", json!(m.query_rank)),
        ("kv_lora_rank", json!(m.kv_rank)),
        ("qk_nope_head_dim", json!(m.nope)),
        ("qk_rope_head_dim", json!(m.rope)),
        ("v_head_dim", json!(m.value)),
        ("n_routed_experts", json!(or_one(m.experts))),
        ("n_shared_experts", json!(m.shared_experts)),
        ("num_experts_per_tok", json!(or_one(m.top_k))),
        ("n_group", json!(or_one(m.groups))),
        ("topk_group", json!(or_one(m.groups_kept))),
        ("routed_scaling_factor", json!(f64::from(m.routed_scale))),
        ("rope_theta", json!(m.rope_theta)),
    ]
}

fn scaling(yarn: &Yarn) -> Value {
    json!({
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    })
}

/// The file of a model whose weights have type `dtype`; `fp8` if most are quantised in blocks; `end` is the
/// token at a document's end.
pub(super) fn write(m: &ModelConfig, dtype: &str, fp8: bool, end: u32) -> Value {
    let mut all = Map::new();
    all.insert("architectures".into(), json!(["DeepseekV3ForCausalLM"]));
    all.insert("model_type".into(), json!("deepseek_v3"));
    all.extend(sizes(m).into_iter().map(|(key, value)| (key.to_owned(), value)));
    all.extend(fixed().into_iter().map(|(key, value)| (key.to_owned(), value)));
    // Some programs take the factor of a stretched model from here and not from `rope_scaling`.
    let stretched = m.yarn.map_or(0, |yarn| (yarn.factor * yarn.original as f64).round() as usize);
    all.insert("max_position_embeddings".into(), json!(m.sequence.max(stretched)));
    all.insert("initializer_range".into(), json!(m.initial_std));
    all.insert("attention_dropout".into(), json!(0.0));
    all.insert("topk_method".into(), json!("noaux_tc"));
    all.insert("moe_layer_freq".into(), json!(1));
    all.insert("num_nextn_predict_layers".into(), json!(m.mtp));
    // Documents have an end but no beginning of their own.
    all.insert("bos_token_id".into(), Value::Null);
    all.insert("eos_token_id".into(), json!(end));
    all.insert("torch_dtype".into(), json!(dtype));
    if let Some(yarn) = &m.yarn {
        all.insert("rope_scaling".into(), scaling(yarn));
    }
    if fp8 {
        let how = json!({
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        });
        all.insert("quantization_config".into(), how);
    }
    Value::Object(all)
}

/// Whether two values say the same: numbers by value, whatever their notation.
fn same(a: &Value, b: &Value) -> bool {
    a.as_f64().zip(b.as_f64()).map_or(a == b, |(a, b)| a == b)
}

/// The rotary base and stretching, in either of the layouts that `transformers` writes.
fn rope(file: &Value) -> (Value, Value) {
    let new = &file["rope_parameters"];
    let theta = if file["rope_theta"].is_null() { &new["rope_theta"] } else { &file["rope_theta"] };
    let old = &file["rope_scaling"];
    let scaling = if old.is_null() { new } else { old };
    let kind = if scaling["rope_type"].is_null() { &scaling["type"] } else { &scaling["rope_type"] };
    let plain = kind.is_null() || kind == "default";
    (theta.clone(), if plain { Value::Null } else { scaling.clone() })
}

/// Compares a file with the model that is to be trained; names every difference.
pub(super) fn compare(file: &Value, m: &ModelConfig) -> Result<()> {
    let mut wrong = Vec::new();
    let (theta, stretched) = rope(file);
    let mixture = m.dense_layers < m.layers;
    for (key, ours) in sizes(m) {
        let theirs = if key == "rope_theta" { &theta } else { &file[key] };
        let routed = ["moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"];
        let routed = routed.contains(&key) || ["n_group", "topk_group", "routed_scaling_factor"].contains(&key);
        let unused = (!mixture && routed) || (m.dense_layers == 0 && key == "intermediate_size");
        let close = key == "routed_scaling_factor" && theirs.as_f64().map(|x| x as f32) == Some(m.routed_scale);
        if !unused && !close && !same(theirs, &ours) {
            wrong.push(format!("{key} is {theirs}, the configuration has {ours}"));
        }
    }
    for (key, value) in fixed() {
        if !file[key].is_null() && !same(&file[key], &value) {
            wrong.push(format!("{key} is {}, only {} is supported", file[key], value));
        }
    }
    match (&m.yarn, stretched.is_null()) {
        (None, true) => {}
        (None, false) => wrong.push(format!("rope_scaling is {stretched}, the configuration has no model.yarn")),
        (Some(_), true) => wrong.push("rope_scaling is missing, the configuration has model.yarn".to_owned()),
        (Some(yarn), false) => {
            for (key, supported) in [("attention_factor", Value::Null), ("truncate", json!(true))] {
                if !stretched[key].is_null() && stretched[key] != supported {
                    wrong.push(format!("rope_scaling.{key} is {}, only {supported} is supported", stretched[key]));
                }
            }
            let ours = scaling(yarn);
            for (key, ours) in ours.as_object().into_iter().flatten().filter(|(key, _)| *key != "type") {
                if !same(&stretched[key], ours) {
                    wrong.push(format!("rope_scaling.{key} is {}, the configuration has {ours}", stretched[key]));
                }
            }
        }
    }
    let modules = file["num_nextn_predict_layers"].as_u64().unwrap_or(0);
    if modules < m.mtp as u64 {
        wrong.push(format!("num_nextn_predict_layers is {modules}, the configuration has model.mtp = {}", m.mtp));
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("; ")) }
}
