"""How many numbers a model holds, from its config alone.

Owns the parameter counts that the plan multiplies with bytes and FLOPs. Counts matrices, not norms and biases (under
one per cent); the counts of default configs are tested against models that transformers builds. Touches nothing.
"""

from dataclasses import dataclass

from .attention_shape import Experts, Heads, read_width
from .config_reading import ConfigView


@dataclass(frozen=True)
class Parameters:
    """
    Parameter counts.

    Attributes:
        total (`int`): all of them.
        active (`int`): those that see one token (fewer than `total` in a mixture of experts).
        embedding (`int`): input and output embeddings, of `total`.
        linear_in_out (`int`): sum over all dense linear layers outside the experts of (inputs + outputs): what a
            LoRA adapter of rank 1 on each of them holds.
    """

    total: int
    active: int
    embedding: int
    linear_in_out: int


def count_parameters(view: ConfigView, kinds: list[str], heads: Heads, experts: Experts | None) -> Parameters:
    """
    Counts the parameters of a text model.

    Args:
        view ([`ConfigView`]): its config.
        kinds (`list[str]`): the kind of every layer.
        heads ([`Heads`]): its attention heads.
        experts ([`Experts`], *optional*): its mixture of experts.
    """
    hidden = view.needed("hidden_size")
    attention = _attention(view, heads, hidden)
    recurrence = _recurrence(view, heads, hidden) if {"recurrent", "branched"} & set(kinds) else []
    convolution = [(hidden, 3 * hidden), (hidden, hidden)]
    per_kind = {"recurrent": recurrence, "conv": convolution, "branched": attention + recurrence, "moe": [], "mlp": []}
    shared_blocks = view.integer("num_mem_blocks") if view.knows("num_mem_blocks") else None
    matrices: list[tuple[int, int]] = []
    attending = 0
    for kind in kinds:
        attending += kind not in ("recurrent", "conv", "moe", "mlp")
        if kind == "branched" and shared_blocks is not None and attending > shared_blocks:
            matrices += recurrence  # Zamba's attention blocks share their weights
        else:
            matrices += per_kind.get(kind, attention)
    moe_layers = min(experts.layers, len(kinds)) if experts else 0
    dense = _dense_layers(view, kinds) - moe_layers
    matrices += _feed_forward(view, hidden, read_width(view)) * max(dense, 0)
    mixture = mixture_active = 0
    if experts:
        if experts.shared_width:
            matrices += _feed_forward(view, hidden, experts.shared_width) * moe_layers
        matrices += [(hidden, experts.count)] * moe_layers
        expert = sum(a * b for a, b in _feed_forward(view, hidden, experts.width))
        mixture = moe_layers * experts.count * expert
        mixture_active = moe_layers * experts.active * expert
    plain = sum(a * b for a, b in matrices)
    embedding = _embeddings(view, hidden, len(kinds))
    return Parameters(
        total=plain + mixture + embedding,
        active=plain + mixture_active + embedding,
        embedding=embedding,
        linear_in_out=sum(a + b for a, b in matrices),
    )


def _dense_layers(view: ConfigView, kinds: list[str]) -> int:
    """Layers with a feed-forward part. Nemotron-H makes it a layer of its own, Zamba and Mamba blocks have none."""
    if "mlp" in kinds or "moe" in kinds:
        return kinds.count("mlp") + kinds.count("moe")
    if view.entry.layers and "hybrid" in view.entry.layers and "linear_attention" in view.entry.layers:
        return view.integer("num_mem_blocks") or 1 if "branched" in kinds else 0
    return len(kinds)


def _attention(view: ConfigView, heads: Heads, hidden: int) -> list[tuple[int, int]]:
    query_width = heads.queries * heads.key_dim
    output = (heads.queries * heads.value_dim, hidden)
    if heads.latent:
        compressed = heads.query_latent
        queries = [(hidden, compressed), (compressed, query_width)] if compressed else [(hidden, query_width)]
        content = heads.key_dim - heads.rope_dim
        return [
            *queries,
            (hidden, heads.latent + heads.rope_dim),
            (heads.latent, heads.queries * (content + heads.value_dim)),
            output,
        ]
    inputs = view.integer("attention_hidden_size") or hidden
    gated = 2 if view.knows("attn_output_gate") and view.get("attn_output_gate") is not False else 1
    gated = 2 if "linear_num_key_heads" in view.entry.defaults and view.entry.positions == "rope" else gated
    return [
        (inputs, gated * query_width),
        (inputs, heads.keys * heads.key_dim),
        (inputs, heads.keys * heads.value_dim),
        output,
    ]


def _recurrence(view: ConfigView, heads: Heads, hidden: int) -> list[tuple[int, int]]:
    """The projections of a state-space, linear-attention or gated-recurrence layer."""
    key_heads = view.integer("linear_num_key_heads")
    if key_heads is not None:  # gated delta rule
        keys = key_heads * (view.integer("linear_key_head_dim") or heads.key_dim)
        values = (view.integer("linear_num_value_heads") or key_heads) * (
            view.integer("linear_value_head_dim") or heads.key_dim
        )
        return [(hidden, 2 * keys + 2 * values), (values, hidden)]
    width = view.integer("lru_width") if view.knows("lru_width") else None
    if view.knows("lru_width"):  # RG-LRU: two branches in, one out, two block-diagonal gates
        width = width or hidden
        return [(hidden, 2 * width), (width, hidden), (2 * width, width // heads.queries)]
    state = view.integer("mamba_d_state", "ssm_state_size")
    if state is not None:
        number = view.integer("mamba_n_heads", "mamba_num_heads")
        inner = view.integer("mamba_d_ssm") or (view.integer("mamba_expand", "expand") or 2) * hidden
        sizes = [name for name in ("mamba_head_dim", "mamba_d_head") if view.get(name) not in (None, "auto")]
        if number and sizes:
            inner = number * view.needed(*sizes)
        groups = view.integer("mamba_n_groups", "n_groups") or 1
        if number or view.raw.get("mamba_ngroups"):  # Mamba-2
            return [(hidden, 2 * inner + 2 * groups * state + (number or 1)), (inner, hidden)]
        rank = -(-hidden // 16)
        return [(hidden, 2 * inner), (inner, rank + 2 * state), (rank, inner), (inner, hidden)]
    return [(hidden, 4 * heads.queries * heads.key_dim), (heads.queries * heads.value_dim, hidden)]


def _feed_forward(view: ConfigView, hidden: int, width: int) -> list[tuple[int, int]]:
    return [(hidden, width)] * (2 if view.entry.gated_ffn else 1) + [(width, hidden)]


def _embeddings(view: ConfigView, hidden: int, layers: int) -> int:
    vocabulary = view.needed("vocab_size")
    width = view.integer("word_embed_proj_dim") or hidden
    total = vocabulary * width * (1 if view.flag("tie_word_embeddings") else 2)
    if view.entry.positions == "learned":
        total += (view.integer("max_position_embeddings") or 0) * hidden
    if view.knows("hidden_size_per_layer_input"):
        per_layer = view.integer("hidden_size_per_layer_input", least=0) or 0
        total += (view.integer("vocab_size_per_layer_input") or vocabulary) * layers * per_layer
    return total
