"""What a conversion costs: memory, tokens, hours, each with the formula it comes from.

Owns the formulas and the table of GPUs. The numbers are estimates to plan with (which GPU, how many of them, for how
long), not promises; every assumption is in the answer. Touches nothing.
"""

from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .attention_shape import Experts, Heads, read_width
from .config_reading import ConfigView
from .layers import LayerCount, window
from .parameters import Parameters


@dataclass(frozen=True)
class Gpu:
    """A GPU: its memory in GB and its dense bf16 rate (fp16 on those without bf16) in TFLOP/s, as its maker states."""

    memory_gb: int
    tflops: int


GPUS = {
    "a10g": Gpu(24, 70),
    "a100": Gpu(80, 312),
    "a100-40gb": Gpu(40, 312),
    "b200": Gpu(180, 2250),
    "gh200": Gpu(96, 989),
    "h100": Gpu(80, 989),
    "h200": Gpu(141, 989),
    "l4": Gpu(24, 121),
    "l40s": Gpu(48, 362),
    "mi300x": Gpu(192, 1307),
    "rtx3090": Gpu(24, 71),
    "rtx4090": Gpu(24, 165),
    "rtx5090": Gpu(32, 209),
    "t4": Gpu(16, 65),
    "v100": Gpu(32, 112),
}
UTILISATION = 0.4  # of the stated rate; what well-kept training loops reach
CONTEXT = 2048  # tokens of one training sequence, one sequence at a time
DECODE_CONTEXT = 4096
CANVAS = 128  # positions decoded at once
LORA_RANK = 16
HEAD_ROWS = 1024  # rows of logits that exist at one time

FULL_BYTES = 16  # a number trained by AdamW in fp32: weight 4, gradient 4, two moments 8
BF16_BYTES = 2
NF4_BYTES = 0.516  # 4 bits and a doubly quantized scale for every 64

FORMULA = {
    "full": "16 B x parameters (fp32 weights, gradients and AdamW moments) + activations",
    "lora": f"2 B x parameters (bf16) + 16 B x rank-{LORA_RANK} adapters on linear layers but experts + activations",
    "qlora": "0.516 B x parameters (nf4) + 2 B x embeddings + 16 B x adapters + activations",
    "activations": "2 B x context x ((layers + 8) x hidden + 2 x heads x head size + 3 x feed-forward width) "
    f"+ 8 B x {HEAD_ROWS} x vocabulary, checkpointed",
    "decode": f"2 B x parameters + 2 B x keys and values of {DECODE_CONTEXT} tokens + 4 B x {CANVAS} x vocabulary",
    "hours": "tokens x (8 x active parameters + 16 x context x heads x head size x attention layers) / "
    f"({UTILISATION} x stated FLOP/s of one GPU); LoRA 6 instead of 8",
    "tokens": "20 per active parameter up to 1e9, then 2 up to 50e9 (Fast-dLLM v2 7B took 1.3e9, SDAR 54e9)",
}


def find_gpu(name: str | None) -> Gpu | None:
    """The GPU of a name; [`BadInput`] with the known names where there is none."""
    if name is None:
        return None
    gpu = GPUS.get(name.lower().replace("_", "-").removeprefix("nvidia-").replace(" ", ""))
    if gpu is None:
        raise BadInput(f"--gpu {name} is not known: choose one of {', '.join(GPUS)}.")
    return gpu


def make_plan(
    view: ConfigView, kinds: list[str], layers: LayerCount, heads: Heads, experts: Experts | None,
    parameters: Parameters, stored: int | None, gpu_name: str | None,
) -> dict[str, Any]:  # fmt: skip
    """
    Plans a conversion.

    Args:
        view ([`ConfigView`]): the text model's config.
        kinds (`list[str]`): the kind of every layer.
        layers ([`LayerCount`]): how many of them open.
        heads ([`Heads`]): its attention heads.
        experts ([`Experts`], *optional*): its mixture of experts.
        parameters ([`Parameters`]): its parameter counts, from the config.
        stored (`int`, *optional*): its parameter count, from the weights' headers.
        gpu_name (`str`, *optional*): the GPU to plan hours for.

    Returns:
        `dict`: `parameters`, `memory_gb`, `objective`, `tokens`, `gpu`, `assumptions` and `formula`.
    """
    total, active = parameters.total, parameters.active
    if stored:
        active, total = max(stored - (total - active), 1), stored
    hidden, vocabulary = view.needed("hidden_size"), view.needed("vocab_size")
    width = read_width(view) if experts is None else experts.active * experts.width + experts.shared_width
    longest = view.integer("max_position_embeddings") or DECODE_CONTEXT
    context, decode_context = min(CONTEXT, longest), min(DECODE_CONTEXT, longest)
    working = 8 * hidden + 2 * heads.queries * heads.key_dim + 3 * width
    activations = 2 * context * (len(kinds) * hidden + working) + 8 * min(HEAD_ROWS, context) * vocabulary
    adapters = LORA_RANK * parameters.linear_in_out
    embeddings = min(parameters.embedding, total)
    memory = {
        "full": FULL_BYTES * total + activations,
        "lora": BF16_BYTES * total + FULL_BYTES * adapters + activations,
        "qlora": NF4_BYTES * (total - embeddings) + BF16_BYTES * embeddings + FULL_BYTES * adapters + activations,
        "decode": BF16_BYTES * total + cache_bytes(view, kinds, heads, decode_context) + 4 * CANVAS * vocabulary,
    }
    tokens = int(max(min(20 * active, 1e9), min(2 * active, 50e9)))
    attending = len(kinds) - sum(kinds.count(kind) for kind in ("recurrent", "conv", "moe", "mlp"))
    pairs = 2 * context * heads.queries * heads.key_dim * attending
    objective, reason = "mdlm", "the whole sequence is refined at once, and any length can be decoded"
    if layers.is_hybrid:
        reason = "layers that must read left to right do not suit BD3LM, which puts every sequence in twice"
    plan: dict[str, Any] = {
        "parameters": {"total": total, "active": active, "source": "weights" if stored else "config"},
        "memory_gb": {name: _round(value / 1e9) for name, value in memory.items()},
        "objective": objective,
        "objective_reason": reason,
        "tokens": tokens,
        "gpu": None,
        "assumptions": {"context": context, "batch": 1, "lora_rank": LORA_RANK, "decode_context": decode_context},
        "formula": FORMULA,
    }
    if (gpu := find_gpu(gpu_name)) is not None:
        rate = UTILISATION * gpu.tflops * 1e12 * 3600
        plan["gpu"] = {
            "name": str(gpu_name).lower(),
            "memory_gb": gpu.memory_gb,
            "hours": {
                "full": _round(tokens * (8 * active + 8 * pairs) / rate),
                "lora": _round(tokens * (6 * active + 8 * pairs) / rate),
            },
            "gpus_for_memory": {
                name: max(1, -int(-memory[name] // (0.9 * gpu.memory_gb * 1e9))) for name in ("full", "lora", "qlora")
            },
        }
    return plan


def cache_bytes(view: ConfigView, kinds: list[str], heads: Heads, context: int) -> int:
    """Bytes of the keys and values (bf16) of one sequence of `context` tokens; windowed layers keep their window."""
    size = window(view) or context
    chunk = view.integer("attention_chunk_size", least=0) or context
    per_token = heads.keys * (heads.key_dim + heads.value_dim)
    kept = {"full": context, "sparse": context, "sliding": min(size, context), "chunked": min(chunk, context)}
    kept["branched"] = min(size, context)
    return BF16_BYTES * per_token * sum(kept.get(kind, 0) for kind in kinds)


def _round(value: float) -> float:
    """Three significant digits: more would promise too much."""
    return float(f"{value:.3g}")
