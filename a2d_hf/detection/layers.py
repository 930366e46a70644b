"""What each layer of a model does with the sequence: attends, within a window or not, or carries a state along.

Owns the reading of the many ways in which configs spell their layers, and the counts that follow ("16 of 64 layers
open"). Touches nothing.
"""

from collections import Counter
from dataclasses import dataclass

from .config_reading import ConfigView, InvalidConfig


# Every name that configs use for a kind of layer -> what it is.
KINDS = {
    "full_attention": "full",
    "attention": "full",
    "global": "full",
    "*": "full",
    "sliding_attention": "sliding",
    "reference_sliding_attention": "sliding",
    "window_attention": "sliding",
    "local": "sliding",
    "chunked_attention": "chunked",
    "indexed_attention": "sparse",
    "deepseek_sparse_attention": "sparse",
    "qwen_sparse_attention": "sparse",
    "minimax_m3_sparse": "sparse",
    "compressed_sparse_attention": "sparse",
    "heavily_compressed_attention": "sparse",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "mamba2": "recurrent",
    "recurrent": "recurrent",
    "M": "recurrent",
    "conv": "conv",
    "hybrid": "branched",  # attention and a recurrence or convolution side by side
    "hybrid_sliding": "branched",
    "moe": "moe",  # a layer that holds a mixture of experts and nothing else
    "mlp": "mlp",
    "E": "moe",
    "-": "mlp",
}
OPENS = {"full", "sliding", "chunked", "sparse", "branched"}
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class LayerCount:
    """
    How many layers open.

    Attributes:
        open (`int`): layers whose attention can see both ways.
        total (`int`): all layers.
        recurrent (`int`): layers that only carry a state from left to right, or convolve over the past.
        branched (`int`): layers that open but keep such a branch beside their attention.
        silent (`int`): layers that do not mix positions at all.
    """

    open: int
    total: int
    recurrent: int
    branched: int
    silent: int

    @property
    def is_hybrid(self) -> bool:
        """Whether anything in the model must stay causal."""
        return self.recurrent + self.branched > 0

    def sentence(self) -> str:
        """The count in words."""
        text = f"{self.open} of {self.total} layers open"
        details = []
        if self.recurrent:
            details.append(f"{self.recurrent} recurrent or convolutional layers still read left to right only")
        if self.branched:
            details.append(f"{self.branched} keep a causal branch beside their attention")
        if self.silent:
            details.append(f"{self.silent} are feed-forward only")
        return text + (": " + ", ".join(details) if details else "")


def count_layers(kinds: list[str]) -> LayerCount:
    """Counts the kinds that [`layer_kinds`] returns."""
    tally = Counter(kinds)
    return LayerCount(
        open=sum(tally[kind] for kind in OPENS),
        total=len(kinds),
        recurrent=tally["recurrent"] + tally["conv"],
        branched=tally["branched"],
        silent=tally["moe"] + tally["mlp"],
    )


def layer_kinds(view: ConfigView) -> list[str]:
    """
    The kind of every layer: full, sliding, chunked, sparse, recurrent, conv, branched, moe or mlp.

    Raises:
        [`InvalidConfig`]: a layer of a kind that does not exist, or another number of kinds than of layers.
    """
    names = _listed(view)
    if names is None:
        names = _periodic(view, view.needed("num_hidden_layers"))
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise InvalidConfig(f"`layer_types` names {str(unknown[0])[:40]!r}, a kind of layer that does not exist.")
    kinds = [KINDS[name] for name in names]
    if window(view) is None:
        kinds = ["full" if kind == "sliding" else kind for kind in kinds]
    if view.integer("attention_chunk_size", least=0) in (None, 0):
        kinds = ["full" if kind == "chunked" else kind for kind in kinds]
    return kinds


def window(view: ConfigView) -> int | None:
    """The sliding window in tokens where one is in force, else `None`. One as long as the context changes nothing."""
    if view.flag("use_sliding_window") is False:
        return None
    for name in ("sliding_window", "window_size", "local_attention"):
        if view.knows(name):
            size = view.integer(name, least=-1)
            context = view.integer("max_position_embeddings")
            if size is not None and size > 0 and (context is None or size < context):
                return size
    return None


def _listed(view: ConfigView) -> list[str] | None:
    """The layers where the config spells them out one by one."""
    if not (view.entry.layers or view.knows("layer_types") or view.knows("attention_types")):
        return None
    pattern = view.raw.get("hybrid_override_pattern")
    explicit = next((n for n in ("layer_types", "layers_block_type") if view.raw.get(n) is not None), None)
    if explicit is not None:
        names = view.items(explicit, str)
        count = view.integer("num_hidden_layers")
        # Nemotron-H takes its depth from the list.
        if count is not None and len(names) != count and "moe" not in view.entry.layers:
            raise InvalidConfig(f"`{explicit}` has {len(names)} entries, but `num_hidden_layers` is {count}.")
    elif isinstance(pattern, str):
        names = list(pattern)
    elif view.get("attention_types") is not None:
        names = _expand(view.items("attention_types", list))
    else:
        return None
    if not 0 < len(names) <= MOST_LAYERS:
        raise InvalidConfig(f"the config lists {len(names)} layers, which no model has.")
    return names


def _expand(groups: list[list]) -> list[str]:
    """GPT-Neo's `[[["global", "local"], 12]]`: each group of names, so many times."""
    names: list[str] = []
    for group in groups:
        pair = len(group) == 2 and isinstance(group[0], list) and type(group[1]) is int
        if not pair or not 0 < len(group[0]) * group[1] <= MOST_LAYERS:
            raise InvalidConfig("`attention_types` must hold pairs of names and a count.")
        names += [str(name) for name in group[0]] * group[1]
    return names


def _periodic(view: ConfigView, count: int) -> list[str]:
    """The layers where the config gives a rule, or nothing at all."""
    if count > MOST_LAYERS:
        raise InvalidConfig(f"`num_hidden_layers` is {count}, which no model has.")
    default = view.entry.layers
    numbers = range(count)

    def every(period: int, other: str, nth: str) -> list[str]:
        return [other if (i + 1) % period else nth for i in numbers]

    def at(indices: list[int], other: str, chosen: str) -> list[str]:
        return [chosen if i in indices else other for i in numbers]

    if view.knows("full_attention_interval"):
        return every(view.needed("full_attention_interval"), default[0], default[-1])
    if view.knows("layer_group_size"):
        return every(view.needed("layer_group_size"), default[0], default[-1])
    if view.knows("global_attn_every_n_layers"):
        period = view.needed("global_attn_every_n_layers")
        if default[0] == "full_attention":  # ModernBERT counts from the first layer, others from the last of a group
            return ["sliding_attention" if i % period else "full_attention" for i in numbers]
        return every(period, "sliding_attention", "full_attention")
    if view.knows("attn_layer_indices"):
        return at(view.items("attn_layer_indices", int) or [], "linear_attention", "full_attention")
    if view.knows("attn_layer_period") and "hybrid" not in default:
        period, offset = view.needed("attn_layer_period"), view.integer("attn_layer_offset", least=0) or 0
        return ["full_attention" if i % period == offset else "linear_attention" for i in numbers]
    if view.knows("block_types"):
        cycle = view.items("block_types", str) or ["attention"]
        return ["sliding_attention" if cycle[i % len(cycle)] == "attention" else "recurrent" for i in numbers]
    if view.entry.layers and view.raw.get("full_attn_idxs") is not None:
        return at(view.items("full_attn_idxs", int), "conv", "full_attention")
    if view.entry.layers and isinstance(view.raw.get("linear_attn_config"), dict):
        one_based = view.items("linear_attn_config.full_attn_layers", int)
        if one_based is not None:
            return at([i - 1 for i in one_based], "linear_attention", "full_attention")
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        pattern = view.raw.get(name)
        if "sliding_attention" in default and isinstance(pattern, str) and set(pattern) <= {"L", "G"} and pattern:
            return ["full_attention" if pattern[i % len(pattern)] == "G" else "sliding_attention" for i in numbers]
        if "sliding_attention" in default and pattern is not None and not isinstance(pattern, str):
            return every(view.needed(name), "sliding_attention", "full_attention")
    if view.flag("use_sliding_window") and view.knows("max_window_layers"):
        first = view.integer("max_window_layers", least=0) or 0
        return ["sliding_attention" if i >= first else "full_attention" for i in numbers]
    if default:
        return [default[i % len(default)] for i in numbers]
    return ["full_attention" if window(view) is None else "sliding_attention"] * count
