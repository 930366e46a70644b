"""What a model is built of, as tags: attention, positions, feed-forward, how its weights are stored.

Owns the vocabulary of capability tags. A tag describes; it never blocks. Touches nothing.
"""

from typing import Any

from .attention_shape import Experts, Heads
from .config_reading import ConfigView
from .layers import window
from .quantization import Quantization


DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
# Where a type keeps its rope settings: `rope_scaling` until transformers 4, `rope_parameters` since.
ROPE_FIELDS = ("rope_parameters", "rope_scaling")
PLAIN_ROPE = (None, "default")
SINK_SWITCHES = ("add_swa_attention_sink_bias", "add_full_attention_sink_bias")


def capabilities(
    view: ConfigView, kinds: list[str], heads: Heads, experts: Experts | None, quantization: Quantization | None,
    config: dict[str, Any],
) -> list[str]:  # fmt: skip
    """
    The tags of a model.

    Args:
        view ([`ConfigView`]): the text model's config.
        kinds (`list[str]`): the kind of every layer.
        heads ([`Heads`]): its attention heads.
        experts ([`Experts`], *optional*): its mixture of experts.
        quantization ([`Quantization`], *optional*): how its weights are stored.
        config (`dict`): the whole config.

    Returns:
        `list[str]`: the tags, in the order attention, positions, feed-forward, head, weights.
    """
    tags = [*_attention(view, kinds, heads), *_positions(view), *_feed_forward(view, kinds, experts)]
    if view.knows("final_logit_softcapping") and view.number("final_logit_softcapping"):
        tags.append("head.softcap")
    if view.flag("tie_word_embeddings"):
        tags.append("head.tied")
    stated = [holder[key] for holder in (view.raw, config) for key in ("dtype", "torch_dtype") if key in holder]
    if stated and isinstance(stated[0], str) and (short := DTYPES.get(stated[0].removeprefix("torch."))):
        tags.append(f"weights.{short}")
    if quantization is not None:
        tags.append(f"weights.{quantization.method.replace('-', '_')}")
        if quantization.dequantizable:
            tags.append("ingest.dequantize")
    return tags


def _attention(view: ConfigView, kinds: list[str], heads: Heads) -> list[str]:
    present = set(kinds)
    tags = []
    if "full" in present:
        tags.append("attn.full")
    if heads.latent:
        tags.append("attn.mla")
    elif heads.keys == 1 < heads.queries:
        tags.append("attn.mqa")
    elif heads.keys < heads.queries:
        tags.append("attn.gqa")
    if "sliding" in present or ("branched" in present and window(view) is not None):
        tags.append("attn.sliding")
    tags += [f"attn.{kind}" for kind in ("chunked", "sparse", "conv") if kind in present]
    if "recurrent" in present or "branched" in present:
        if any(word in field for field in view.entry.defaults for word in ("mamba", "ssm", "lru_")):
            tags.append("attn.ssm")
        else:
            tags.append("attn.linear" if "recurrent" in present else "attn.conv")
    if view.entry.sinks and _has_sinks(view):
        tags.append("attn.sink")
    if view.knows("attn_logit_softcapping") and view.number("attn_logit_softcapping"):
        tags.append("attn.softcap")
    return tags


def _has_sinks(view: ConfigView) -> bool:
    """Types whose sinks can be switched off say so per kind of layer."""
    switches = [name for name in SINK_SWITCHES if view.knows(name) or name in view.raw]
    return not switches or any(view.flag(name) for name in switches)


def _positions(view: ConfigView) -> list[str]:
    positions = view.entry.positions
    if positions == "rope" and view.knows("alibi") and view.flag("alibi"):
        positions = "alibi"
    if positions == "alibi" and (view.table("attn_config") or {}).get("alibi") is False:
        positions = "learned"
    if view.knows("position_embedding_type") and view.text("position_embedding_type") == "nope":
        positions = "none"
    if view.raw.get("use_mem_rope") is False:
        positions = "none"
    tags = [f"pos.{positions}"]
    if positions == "rope":
        tags += [f"pos.rope.{variant}" for variant in _rope_variants(view)]
        rope_layers = view.raw.get("no_rope_layers")
        if isinstance(rope_layers, list) and 0 in rope_layers:
            tags.append("pos.none")
    return tags


def _rope_variants(view: ConfigView) -> list[str]:
    variants: list[str] = []
    partial = False
    for name in ROPE_FIELDS:
        settings = view.table(name)
        if settings is None:
            continue
        # Models with several kinds of layers keep one set of rope settings for each.
        nested = [value for value in settings.values() if isinstance(value, dict)]
        for group in nested or [settings]:
            kind = group.get("rope_type", group.get("type"))
            if isinstance(kind, str) and kind not in PLAIN_ROPE and kind.replace("_", "").isalnum():
                variants.append({"su": "longrope", "mrope": "mrope"}.get(kind, kind))
            if group.get("mrope_section") is not None:
                variants.append("mrope")
            partial |= _is_fraction(group.get("partial_rotary_factor"))
    for name in ("partial_rotary_factor", "rotary_pct"):
        partial |= (view.knows(name) or name in view.raw) and _is_fraction(view.get(name))
    if view.knows("rotary_dim") and (rotary := view.integer("rotary_dim", least=0)):
        head_dim = view.integer("head_dim") or view.needed("hidden_size") // view.needed("num_attention_heads")
        partial |= rotary < head_dim
    return list(dict.fromkeys(variants)) + ["partial"] * partial


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1


def _feed_forward(view: ConfigView, kinds: list[str], experts: Experts | None) -> list[str]:
    if experts is None or not experts.layers:
        return ["ffn.dense"]
    tags = ["ffn.moe"]
    if experts.shared_width:
        tags.append("ffn.moe.shared_experts")
    if experts.layers < (kinds.count("moe") + kinds.count("mlp") or len(kinds)):
        tags.append("ffn.dense")
    return tags
