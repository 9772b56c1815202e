"""Five DeepSeek-V3 configurations that differ in every dimension, and the same for Everstep."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

YARN = dict(type="yarn", original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0)

# name: sizes. "dense" has no routed experts, and several blocks of FP8 (transformers wants them whole); "yarn" is
# stretched; "direct" has no query compression.
MODELS = {
    "plain": dict(vocab_size=256, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
                  first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
                  qk_rope_head_dim=4, v_head_dim=12, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
                  n_group=1, topk_group=1, routed_scaling_factor=1.0, rope_theta=10000.0),
    "direct": dict(vocab_size=270, hidden_size=40, intermediate_size=56, moe_intermediate_size=20, num_hidden_layers=2,
                   first_k_dense_replace=0, num_attention_heads=4, q_lora_rank=None, kv_lora_rank=20,
                   qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=6, n_shared_experts=2,
                   num_experts_per_tok=3, n_group=2, topk_group=1, routed_scaling_factor=2.5, rope_theta=5000.0),
    "yarn": dict(vocab_size=264, hidden_size=24, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=4,
                 first_k_dense_replace=2, num_attention_heads=3, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6,
                 qk_rope_head_dim=16, v_head_dim=10, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
                 n_group=4, topk_group=2, routed_scaling_factor=1.7, rope_theta=10000.0,
                 rope_scaling=YARN | dict(factor=4.0, mscale=1.0, mscale_all_dim=1.0)),
    "groups": dict(vocab_size=260, hidden_size=48, intermediate_size=64, moe_intermediate_size=8, num_hidden_layers=5,
                   first_k_dense_replace=1, num_attention_heads=6, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=4,
                   qk_rope_head_dim=6, v_head_dim=6, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=6,
                   n_group=8, topk_group=4, routed_scaling_factor=2.2, rope_theta=20000.0,
                   rope_scaling=YARN | dict(factor=8.0, mscale=0.7, mscale_all_dim=1.3)),
    "dense": dict(vocab_size=258, hidden_size=256, intermediate_size=384, moe_intermediate_size=1, num_hidden_layers=1,
                  first_k_dense_replace=1, num_attention_heads=5, q_lora_rank=10, kv_lora_rank=24, qk_nope_head_dim=10,
                  qk_rope_head_dim=10, v_head_dim=14, n_routed_experts=1, n_shared_experts=1, num_experts_per_tok=1,
                  n_group=1, topk_group=1, routed_scaling_factor=2.5, rope_theta=10000.0),
}

SEQUENCE = 48


def make(name, seed):
    """A model with weights large enough to make every part count, and gate biases of both signs."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        **MODELS[name], num_key_value_heads=MODELS[name]["num_attention_heads"], max_position_embeddings=SEQUENCE,
        num_mtp_layers=0, tie_word_embeddings=False, norm_topk_prob=True, bos_token_id=0, eos_token_id=1)
    model = DeepseekV3ForCausalLM(config).eval()
    fill(model)
    return model


def of_sizes(m, experts):
    """A model with the sizes of a configuration's [model], as transformers makes it."""
    config = DeepseekV3Config(
        vocab_size=m.get("vocabulary", 256), hidden_size=m["hidden"], intermediate_size=m["dense_inner"],
        moe_intermediate_size=m["expert_inner"], num_hidden_layers=m["layers"],
        first_k_dense_replace=m["dense_layers"], num_attention_heads=m["heads"], num_key_value_heads=m["heads"],
        qk_nope_head_dim=m["nope"], qk_rope_head_dim=m["rope"], v_head_dim=m["value"], kv_lora_rank=m["kv_rank"],
        q_lora_rank=m["query_rank"], n_routed_experts=m["experts"], num_experts_per_tok=m["top_k"],
        n_group=m["groups"], topk_group=m["groups_kept"], n_shared_experts=m["shared_experts"], norm_topk_prob=True,
        routed_scaling_factor=m["routed_scale"], max_position_embeddings=m["sequence"], num_mtp_layers=0,
        tie_word_embeddings=False, use_cache=False, bos_token_id=0, eos_token_id=1)
    config._experts_implementation = experts
    return DeepseekV3ForCausalLM(config)


def fill(module):
    """Random values for all weights of a module."""
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if key.endswith("e_score_correction_bias"):
                value.copy_(0.1 * torch.randn_like(value))
            elif "norm" in key:
                value.copy_(1 + 0.2 * torch.randn_like(value))
            else:
                value.copy_(torch.randn_like(value) * 1.2 / value.shape[-1] ** 0.5)
            # Exact in bf16, so that a checkpoint in bf16 holds the same model.
            value.copy_(value.bfloat16().float())


def toml(name, folder, text, **over):
    """The same model for Everstep: a whole run file."""
    m = MODELS[name]
    dense = m["first_k_dense_replace"] == m["num_hidden_layers"]
    o = dict(steps=100, lr=1e-3, warmup=0, bias_step=0.0, balance=0.0, lanes=2, micro_batches=1, sequences=2) | over
    lines = [
        "[run]", f'folder = "{folder}"', "[train]", f"steps = {o['steps']}", "seed = 7",
        "[data]", f'paths = ["{text}"]',
        "[job]", f"lanes = {o['lanes']}", "stages = 1", f"micro_batches = {o['micro_batches']}",
        f"sequences = {o['sequences']}", "nodes = 1", "shards = 1",
        "[checkpoint]", "every = 100", "[recovery]", "mirrors = 0",
        "[optimizer]", f"lr = {o['lr']}", f"lr_end = {o['lr']}", f"warmup = {o['warmup']}",
        f"bias_step = {o['bias_step']}", f"balance_weight = {o['balance']}",
        "[model]", f"vocabulary = {m['vocab_size']}", f"hidden = {m['hidden_size']}",
        f"layers = {m['num_hidden_layers']}", f"dense_layers = {m['first_k_dense_replace']}",
        f"dense_inner = {m['intermediate_size']}", f"heads = {m['num_attention_heads']}",
        f"kv_rank = {m['kv_lora_rank']}", f"nope = {m['qk_nope_head_dim']}", f"rope = {m['qk_rope_head_dim']}",
        f"value = {m['v_head_dim']}", f"sequence = {SEQUENCE}", f"rope_theta = {m['rope_theta']}",
        "initial_std = 0.02",
    ]
    if m["q_lora_rank"] is not None:
        lines.append(f"query_rank = {m['q_lora_rank']}")
    if not dense:
        lines += [
            f"experts = {m['n_routed_experts']}", f"shared_experts = {m['n_shared_experts']}",
            f"expert_inner = {m['moe_intermediate_size']}", f"top_k = {m['num_experts_per_tok']}",
            f"groups = {m['n_group']}", f"groups_kept = {m['topk_group']}",
            f"routed_scale = {m['routed_scaling_factor']}",
        ]
    if "rope_scaling" in m:
        y = m["rope_scaling"]
        lines += ["[model.yarn]", f"factor = {y['factor']}", f"original = {y['original_max_position_embeddings']}",
                  f"beta_fast = {y['beta_fast']}", f"beta_slow = {y['beta_slow']}", f"mscale = {y['mscale']}",
                  f"mscale_all_dim = {y['mscale_all_dim']}"]
    return "\n".join(lines) + "\n"
