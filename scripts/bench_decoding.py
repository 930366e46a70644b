"""How fast block decoding is, against the loop that peers publish, on a random model: time only, no quality.

    python scripts/bench_decoding.py                          a small model, about a minute on two cores
    python scripts/bench_decoding.py --preset qwen3-0.6b      the shape of Qwen3-0.6B
    python scripts/bench_decoding.py --compile                with a static cache too, uncompiled and compiled

Owns the reference loop and the table; writes one JSON file. Everything compared runs in this process, in turns, and
must give the same tokens with the same number of denoising forwards, or nothing is written. Speed-ups are in tokens
per second; the published loop takes one row. Quality is bench_decoding_quality.py's business.
"""

import argparse
import contextlib
import copy
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, CompileConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from a2d_hf.atomic_files import write_json
from a2d_hf.console import Console
from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig


ROOT = Path(__file__).resolve().parents[1]
_QWEN3 = {"tie_word_embeddings": True, "max_position_embeddings": 4096}
PRESETS = {
    "small": _QWEN3
    | {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 32000,
    },
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}


class Stopwatch:
    """Seconds by name."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, function: Callable, *args, **kwargs) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[name] += time.perf_counter() - started
        return result


@torch.no_grad()
def reference_loop(
    model: A2DForMaskedDiffusion, prompt_1P: torch.Tensor, new: int, steps: int, watch: Stopwatch
) -> tuple[torch.Tensor, int]:
    """
    Block decoding as published with block diffusion models: before each block the whole prefix is encoded again, every
    step copies that cache, and every row of the block goes through the head.

    Args:
        prompt_1P (`torch.LongTensor` of shape `(1, P)`): the prompt; P and `new` are multiples of the block size.
        new (`int`), steps (`int`): tokens to write, and forwards for all of them; both divisible by the blocks.
        watch (`Stopwatch`): where the time goes.

    Returns:
        The row, and the number of forward passes.
    """
    mask, block = model.config.mask_token_id, model.config.block_size
    row_1L = torch.cat([prompt_1P, prompt_1P.new_full((1, new), mask)], dim=1)
    per_step = new // steps
    forwards = 0
    for start in range(prompt_1P.shape[1], row_1L.shape[1], block):
        prefix = watch("prefix again", model, row_1L[:, :start], use_cache=True).past_key_values
        forwards += 1
        while bool((row_1L[:, start : start + block] == mask).any()):
            here_1B = row_1L[:, start : start + block]
            cache = watch("cache copies", copy.deepcopy, prefix)
            logits_1BV = watch("block", model, here_1B, past_key_values=cache, use_cache=True).logits
            forwards += 1
            logits_1BV[..., mask] = float("-inf")
            confidence_1B, token_1B = logits_1BV.float().softmax(-1).max(-1)
            confidence_1B = confidence_1B.masked_fill(here_1B != mask, -1.0)
            chosen = confidence_1B[0].argsort(descending=True, stable=True)[:per_step]
            row_1L[0, start + chosen] = token_1B[0, chosen]
    return row_1L, forwards


def time_head(model: A2DForMaskedDiffusion, watch: Stopwatch) -> list[Any]:
    """Counts the time inside the output head, of whatever runs, under "head"."""
    started = []
    head = model.get_output_embeddings()

    def after(*_):
        watch.seconds["head"] += time.perf_counter() - started.pop()

    return [
        head.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
        head.register_forward_hook(after),
    ]


@contextlib.contextmanager
def time_masks(watch: Stopwatch) -> Iterator[None]:
    """While entered, counts the time in which masks are built, of whatever runs, under "mask"."""
    build_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    AttentionMaskInterface.register("sdpa", lambda *args, **kwargs: watch("mask", build_mask, *args, **kwargs))
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", build_mask)


def build(preset: str, block_size: int, dtype: torch.dtype) -> A2DForMaskedDiffusion:
    torch.manual_seed(0)
    parent = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **PRESETS[preset]), dtype=dtype).eval()
    model = A2DForMaskedDiffusion.from_causal_lm(
        parent, mask_token_id=parent.config.vocab_size - 1, objective="bd3lm", block_size=block_size
    )
    model.generation_config = A2DGenerationConfig(pad_token_id=0)
    return model


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs all contestants in turns, `--repeats` times."""
    model = build(args.preset, args.block_size, getattr(torch, args.dtype))
    prompt_1P = torch.randint(1, 1000, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    watches: dict[str, Stopwatch] = {}

    prompt_RP = torch.randint(1, 1000, (args.rows, args.prompt), generator=torch.Generator().manual_seed(2))

    def ours(use_cache: bool, prompts: torch.Tensor = prompt_1P, **cache: Any) -> tuple[torch.Tensor, int]:
        output = model.diffusion_generate(
            prompts,
            max_new_tokens=args.new,
            steps=args.steps,
            use_cache=use_cache,
            return_dict_in_generate=True,
            **cache,
        )
        return output.sequences, output.num_forwards

    def parent(prompts: torch.Tensor) -> tuple[None, int]:
        model.backbone.generate(
            prompts, max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False, pad_token_id=0
        )
        return None, args.new

    contestants: dict[str, Callable[[Stopwatch], tuple[Any, int]]] = {
        "published loop": lambda watch: reference_loop(model, prompt_1P, args.new, args.steps, watch),
        "a2d_hf, no cache": lambda watch: ours(False),
        "a2d_hf": lambda watch: ours(True),
        "parent, left to right": lambda watch: parent(prompt_1P),
        f"a2d_hf, {args.rows} rows": lambda watch: ours(True, prompt_RP),
        f"parent, {args.rows} rows": lambda watch: parent(prompt_RP),
    }
    if args.compile:
        static = {"cache_implementation": "static"}
        contestants["a2d_hf, static"] = lambda watch: ours(True, **static)
        # Of its runs the first compiles, and the best counts.
        compiled = static | {"compile_config": CompileConfig(mode="default")}
        contestants["a2d_hf, compiled"] = lambda watch: ours(True, **compiled)
    tokens = {name: args.new * (args.rows if name.endswith("rows") else 1) for name in contestants}
    times: dict[str, list[float]] = defaultdict(list)
    forwards: dict[str, int] = {}
    rows: dict[str, torch.Tensor] = {}
    with console.progress("runs", args.repeats * len(contestants), "run") as progress:
        for _ in range(args.repeats):
            for name, contestant in contestants.items():
                watches[name] = watch = Stopwatch()
                # Hooks that read a clock would be compiled too, again for every run.
                whole = name.endswith("compiled")
                hooks = [] if whole else time_head(model, watch)
                started = time.perf_counter()
                with contextlib.nullcontext() if whole else time_masks(watch):
                    rows[name], forwards[name] = contestant(watch)
                times[name].append(time.perf_counter() - started)
                for hook in hooks:
                    hook.remove()
                progress.advance()
    for name in [name for name in contestants if name.startswith("a2d_hf") and not name.endswith("rows")]:
        if not torch.equal(rows[name], rows["published loop"]):
            raise SystemExit(f"{name} gave other tokens than the published loop: nothing is measured.")
    best = {name: min(values) for name, values in times.items()}
    return {
        "setting": {name: value for name, value in vars(args).items() if name not in ("out", "json")},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "same_tokens": True,
        "runs": {
            name: {
                "seconds_best": round(best[name], 3),
                "seconds_median": round(statistics.median(times[name]), 3),
                "forwards": forwards[name],
                "tokens_per_second": round(tokens[name] / best[name], 2),
                "speedup_over_published_loop": round(best["published loop"] * tokens[name] / args.new / best[name], 2),
                "seconds_of_last_run": {part: round(value, 3) for part, value in watches[name].seconds.items()},
            }
            for name in contestants
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="shape of the random model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt, whole blocks")
    parser.add_argument("--new", type=int, default=256, help="tokens to write, whole blocks")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per block")
    parser.add_argument("--steps", type=int, default=64, help="denoising forwards, the same number in each block")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--rows", type=int, default=16, help="rows of the batch that both decoders get besides")
    parser.add_argument("--compile", action="store_true", help="also a static cache, uncompiled and compiled")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the best counts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "decoding_cpu.json", help="the JSON file")
    args = parser.parse_args()
    blocks = args.new // args.block_size
    if args.prompt % args.block_size or args.new % args.block_size or args.steps % blocks or args.new % args.steps:
        parser.error(
            "--prompt and --new must be whole blocks, and --steps must share --new and the blocks out evenly: the "
            "published loop knows nothing else."
        )
    console = Console()
    result = compare(args, console)
    headers = ["", "seconds", "forwards", "tokens/s", "speed-up", "of which (s)"]
    console.table(
        headers,
        [
            [
                name,
                run["seconds_best"],
                run["forwards"],
                run["tokens_per_second"],
                run["speedup_over_published_loop"],
                ", ".join(f"{part} {value:.2f}" for part, value in run["seconds_of_last_run"].items()),
            ]
            for name, run in result["runs"].items()
        ],
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"command": " ".join(["python scripts/bench_decoding.py", *sys.argv[1:]])} | result)
    console.line(f"written: {args.out.name}")


if __name__ == "__main__":
    main()
