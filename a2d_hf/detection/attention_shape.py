"""The sizes that every other room needs: heads, their width, experts, feed-forward width.

Owns the many names under which configs hide the same number. Touches nothing.
"""

from dataclasses import dataclass

from .config_reading import ConfigView, InvalidConfig


NUMBER_OF_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "ffn_config.moe_top_k",
    "experts_per_token",
)  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """
    The attention heads of a model.

    Attributes:
        queries (`int`): query heads.
        keys (`int`): key and value heads.
        key_dim (`int`): width of a query or key head.
        value_dim (`int`): width of a value head.
        latent (`int`, *optional*): width of the compressed keys and values (MLA).
        query_latent (`int`, *optional*): width of the compressed queries.
        rope_dim (`int`): of a compressed head, the part that carries the position.
    """

    queries: int
    keys: int
    key_dim: int
    value_dim: int
    latent: int | None = None
    query_latent: int | None = None
    rope_dim: int = 0


@dataclass(frozen=True)
class Experts:
    """
    The mixture of experts of a model.

    Attributes:
        count (`int`): routed experts of a layer.
        active (`int`): of these, how many see a token.
        width (`int`): inner width of one expert.
        shared_width (`int`): inner width of all experts that see every token, together.
        layers (`int`): layers with a mixture.
    """

    count: int
    active: int
    width: int
    shared_width: int
    layers: int


def read_heads(view: ConfigView) -> Heads:
    """
    Reads the attention heads.

    Raises:
        [`InvalidConfig`]: numbers that do not fit together.
    """
    hidden = view.needed("hidden_size")
    queries = view.needed("num_attention_heads")
    keys = _key_heads(view, queries)
    if queries % keys and "num_key_value_heads" not in view.raw:
        keys = queries  # the type's default, made for another number of heads
    if queries % keys:
        raise InvalidConfig(f"`num_attention_heads` ({queries}) is not a multiple of the key-value heads ({keys}).")
    head_dim = view.integer("head_dim", "attention_head_dim", "kv_channels", least=0) or None
    latent = view.integer("kv_lora_rank", least=0) if view.knows("kv_lora_rank") else None
    if latent:
        rope = view.integer("qk_rope_head_dim", least=0) or 0
        content = view.integer("qk_nope_head_dim", least=0) or head_dim or hidden // queries
        values = view.integer("v_head_dim") or content
        return Heads(queries, queries, content + rope, values, latent, view.integer("q_lora_rank", least=0), rope)
    if head_dim is None:
        if hidden < queries:
            raise InvalidConfig(f"`num_attention_heads` ({queries}) exceeds `hidden_size` ({hidden}).")
        head_dim = hidden // queries
    return Heads(queries, keys, head_dim, view.integer("v_head_dim") or head_dim)


def _key_heads(view: ConfigView, queries: int) -> int:
    if view.knows("new_decoder_architecture") and view.flag("new_decoder_architecture"):
        return view.integer("num_kv_heads") or queries
    if view.knows("multi_query"):
        return 1 if view.flag("multi_query") else queries
    return view.integer("num_key_value_heads", "attn_config.kv_n_heads") or queries


def read_width(view: ConfigView) -> int:
    """Inner width of a dense feed-forward layer."""
    hidden = view.needed("hidden_size")
    width = view.integer("intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size")
    # Gemma 3n writes one width per layer.
    per_layer = view.get("intermediate_size")
    if width is None and isinstance(per_layer, list) and per_layer:
        width = max(view.items("intermediate_size", int) or [0])
    if width is None and not isinstance(per_layer, list):
        width = view.integer("intermediate_size", "ffn_dim", "n_inner", "dff", "ffn_hidden_size")
    if width is None:
        width = (view.integer("expansion_ratio") or 4) * hidden
    if view.knows("lru_width"):
        width //= 2  # RecurrentGemma states the width of gate and input together
    if view.knows("block_auto_adjust_ff_dim") and view.flag("block_auto_adjust_ff_dim"):
        multiple = view.integer("block_multiple_of") or 256
        width = -(-2 * width // 3 // multiple) * multiple
    return width


def read_experts(view: ConfigView, kinds: list[str]) -> Experts | None:
    """The mixture of experts, or `None` where every layer is dense; `kinds` as [`layer_kinds`] returns them."""
    if any(view.knows(switch) and not view.flag(switch) for switch in ("enable_moe_block", "is_moe")):
        return None
    count = view.integer(*NUMBER_OF_EXPERTS, "ffn_config.moe_num_experts", least=0)
    if not count or count == 1 or not _knows_experts(view):
        return None
    active = view.integer(*EXPERTS_PER_TOKEN, least=0)
    active = min(active or 1, count)
    per_modality = view.raw.get("moe_intermediate_size")
    if isinstance(per_modality, list) and per_modality:  # ERNIE 4.5 VL: text experts first, then those for images
        width = view.items("moe_intermediate_size", int)[0]
    else:
        width = view.integer("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_config.ffn_hidden_size")
    width = max(width or view.integer("intermediate_size") or read_width(view), 1)
    shared = view.integer(
        "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", least=0
    )
    number = view.integer("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", least=0)
    if shared is None and view.knows("interleave_moe_layer_step"):
        shared = width  # Llama 4 always has one, and no field for it
    elif shared is None:
        shared = (number or 0) * width
    return Experts(count, active, width, shared, _moe_layers(view, kinds))


def _knows_experts(view: ConfigView) -> bool:
    return any(view.knows(name) for name in NUMBER_OF_EXPERTS) or view.table("ffn_config") is not None


def _moe_layers(view: ConfigView, kinds: list[str]) -> int:
    """How many layers hold a mixture of experts."""
    if "moe" in kinds or "mlp" in kinds:
        return kinds.count("moe")
    for name in ("mlp_layer_types", "moe_layers", "moe_layer_freq"):
        listed = view.raw.get(name)
        if isinstance(listed, list):
            return min(len(listed) if name == "moe_layers" else sum(v not in ("dense", 0) for v in listed), len(kinds))
    if view.knows("expert_layer_period"):
        period, offset = view.needed("expert_layer_period"), view.integer("expert_layer_offset", least=0) or 0
        return sum(i % period == offset for i in range(len(kinds)))
    dense = view.integer("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", least=0)
    if dense is None:
        dense = view.entry.leading_dense or 0
    step = view.integer("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", least=0) or 1
    excluded = set(view.items("mlp_only_layers", int) or []) if view.knows("mlp_only_layers") else set()
    return sum(i >= dense and (i + 1) % step == 0 and i not in excluded for i in range(len(kinds)))
