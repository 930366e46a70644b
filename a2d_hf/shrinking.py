"""A tiny model of the same architecture: every kind of layer kept, every size cut down.

Owns the rules by which a configuration shrinks. What decides how attention behaves survives: layer kinds and their
order, grouped heads, windows and chunks (cut below the probe, never removed), experts, latent attention, sinks,
soft-caps, recurrences, shared caches. Used by the architecture matrix, and by `a2d convert` to test windows that are
too long to cross on the real weights.
"""

import copy
from typing import Any

from transformers import PreTrainedConfig


HIDDEN, HEADS, HEAD_DIM, WINDOW, CONTEXT, VOCAB = 64, 4, 16, 8, 128, 128

# What a size is called across 189 causal language models, and what it becomes. Only ever applied to numbers that are
# larger already.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "word_embed_proj_dim",
            "lru_width",
            "emb_dim",
            "embedding_size",
            "input_embedding_size",
            "output_embedding_size",
            "embedding_dim",
            "attention_hidden_size",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "dff",
            "d_inner",
            "ffn_hidden_size",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "dense_intermediate_size",
            "intermediate_size_mlp",
            "shared_intermediate_size",
            "feed_forward_size",
            "dim_ff",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
        ),
        2 * HIDDEN,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "intermediate_multiple_size",
            "router_hidden_size",
        ),
        HIDDEN // 2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "swa_num_attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
            "linear_num_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "attention_head_dim",
            "d_head",
            "dim_head",
            "global_head_dim",
            "swa_head_dim",
            "v_head_dim",
            "qk_nope_head_dim",
            "kv_channels",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_head_dim",
            "index_head_dim",
            "swa_v_head_dim",
            "attention_head_size",
        ),
        HEAD_DIM,
    ),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input", "laurel_rank"), 32),
    **dict.fromkeys(
        (
            "sliding_window",
            "attention_chunk_size",
            "window_size",
            "attention_window_size",
            "sliding_window_size",
            "local_attention",
            "attention_window",
        ),
        WINDOW,
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "linear_num_key_heads",
            "index_n_heads",
            "n_group_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "top_k_experts",
            "moe_topk",
            "moe_k",
            "moe_top_k",
            "zero_expert_num",
            "n_mamba_heads",
        ),
        2,
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "context_length",
            "model_max_length",
            "max_target_positions",
            "original_max_position_embeddings",
        ),
        CONTEXT,
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCAB),
    "query_pre_attn_scalar": HEAD_DIM,
    "index_topk": CONTEXT,
}
_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
)
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "swa_num_key_value_heads",
    "num_query_groups",
    "num_global_key_value_heads",
)


def shrink_config(config: PreTrainedConfig, **overrides: Any) -> PreTrainedConfig:
    """
    A configuration of the same architecture with every size cut down.

    Args:
        config (`PreTrainedConfig`): any causal language model's configuration; not changed.
        overrides: values that win over the rules.

    Returns:
        `PreTrainedConfig`: of the same class.
    """
    values = copy.deepcopy(config.to_dict())
    for name in ("model_type", "transformers_version", "architectures", "_name_or_path", "id2label", "label2id"):
        values.pop(name, None)
    values.pop("quantization_config", None)
    values = _shrink(values)
    values.update(overrides)
    return type(config)(**values)


def _shrink(values: dict[str, Any]) -> dict[str, Any]:
    values = _shrink_layers(values)
    latent_rope = "qk_rope_head_dim" in values and values.get("head_dim") == values["qk_rope_head_dim"]
    heads = next((values[n] for n in ("num_attention_heads", "n_head", "n_heads", "num_heads") if values.get(n)), None)
    for name in _KV_HEADS:
        if name in values and heads:
            count = values[name] or heads
            values[name] = 1 if count == 1 else HEADS if count == heads else HEADS // 2
    if "head_dim" in values and values["head_dim"] is None:
        values["head_dim"] = HEAD_DIM
    for name, small in _SIZES.items():
        if isinstance(values.get(name), int) and not isinstance(values[name], bool):
            values[name] = min(values[name], small)
        elif isinstance(values.get(name), list) and all(isinstance(v, int) for v in values[name]):
            values[name] = [min(v, small) for v in values[name]]
    if latent_rope:
        values["head_dim"] = values["qk_rope_head_dim"]
    if {"qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"} <= values.keys():
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    _shrink_state_space(values)
    for name, small in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 0)):
        if values.get(name) is not None:
            values[name] = small
    for name, value in values.items():
        if name.endswith("_config") and isinstance(value, dict) and name != "per_layer_config":
            values[name] = _shrink(value)
    return values


def _shrink_state_space(values: dict[str, Any]) -> None:
    """The heads of a state-space layer must fill its inner width exactly."""
    hidden = values.get("hidden_size")
    if not isinstance(hidden, int):
        return
    inner = values.get("mamba_expand", values.get("expand", 2)) * hidden
    for count, width in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("n_mamba_heads", "mamba_headdim"),
    ):
        if count in values and width in values:
            values[count], values[width] = inner // HEAD_DIM, HEAD_DIM
            if "mamba_d_ssm" in values:
                values["mamba_d_ssm"] = inner
    if "attention_head_dim" in values and "attention_hidden_size" in values:
        values["attention_hidden_size"] = values["num_attention_heads"] * values["attention_head_dim"]
    if "expand" in values and "num_heads" in values and "head_dim" in values:
        values["num_heads"] = inner // values["head_dim"]
    if "attn_layer_period" in values:
        values.update(attn_layer_period=2, attn_layer_offset=1)


def _shrink_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Keeps one layer of every kind and at least four, in the parent's order, across all per-layer lists."""
    for count_name in _LAYER_COUNTS:
        count = values.get(count_name)
        if not isinstance(count, int) or count <= 4:
            continue
        per_layer = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == count}
        exceptions = values.get("per_layer_config") or {}
        borrowed = values.get("num_kv_shared_layers") or 0
        kept: list[int] = []
        kinds = set()
        for index in range(count):
            kind = [repr(v[index]) for _, v in sorted(per_layer.items()) if isinstance(v[index], str)]
            # A layer that borrows another's keys and values is a kind of its own.
            kind = (*kind, borrowed and index >= count - borrowed)
            if kind not in kinds:
                kinds.add(kind)
                kept.append(index)
        for index in reversed(range(count)):
            if len(kept) >= 4:
                break
            if index not in kept:
                kept.append(index)
        kept.sort()
        for name, listed in per_layer.items():
            values[name] = [listed[index] for index in kept]
        if exceptions:
            values["per_layer_config"] = {
                new: _shrink(dict(exceptions[key]))
                for new, old in enumerate(kept)
                for key in exceptions
                if int(key) == old
            }
        if borrowed:
            values["num_kv_shared_layers"] = sum(index >= count - borrowed for index in kept)
        values[count_name] = len(kept)
    return values


_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "sliding_window_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def lost_structure(full: PreTrainedConfig, small: PreTrainedConfig) -> list[str]:
    """
    What of an architecture did not survive shrinking: kinds of layers, windows, experts.

    Returns:
        `list[str]`: names of what is gone; empty when the small model is a fair stand-in.
    """
    before, after = full.get_text_config().to_dict(), small.get_text_config().to_dict()
    lost = []
    for name, value in before.items():
        if isinstance(value, list) and len(value) > 4 and all(isinstance(kind, str) for kind in value):
            missing = set(value) - set(after.get(name) or [])
            lost += [f"{name} {kind}" for kind in sorted(missing)]
    for name in _WINDOWS:
        if isinstance(before.get(name), int) and before[name] > 0 and not after.get(name):
            lost.append(name)
    for name in _EXPERTS:
        if isinstance(before.get(name), int) and before[name] > 1 and not (after.get(name) or 0) > 1:
            lost.append(name)
    return lost
