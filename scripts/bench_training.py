"""Times one training step of this project against the step that is published: logits of every position, a dense mask.

    OMP_NUM_THREADS=1 python scripts/bench_training.py --output benchmarks/training_cpu.json
    python scripts/bench_training.py --gpu --output benchmarks/training_gpu.json

The published step is written here, from its definition: the doubled sequence (or, for two views, two of them), a dense
mask built edge by edge on tensors, the output head over every position, cross-entropy in fp32 over all of it. Ours is
the trainer's own `compute_loss`. Both run forward and backward of the same model, with the same rows and noise, in
turns, in one process; each turn gives one ratio, and the median and the smallest of them are reported.

Peak memory is the largest sum of live tensors during a step that starts without gradients, as every optimizer step
does, less the size of all gradients: what a step needs above weights and gradients. It is read from the allocator, in
a process of its own per step, also at the row length of published runs (`--memory_lengths`).

The model has the width and vocabulary of Qwen3-0.6B and fewer layers. `--gpu` takes all 28 in bfloat16 and longer
rows, and times sdpa against flex attention.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config

from a2d_hf import A2DForMaskedDiffusion, BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer


ARMS = ("mdlm", "bd3lm", "bd3lm_complementary")

# Qwen3-0.6B: hidden size, all queries, all keys (and as many values), feed-forward size, vocabulary, layers.
HIDDEN, QUERIES, KEYS, FEED_FORWARD, VOCABULARY, LAYERS = 1024, 2048, 1024, 3072, 151_936, 28


def build_model(options: argparse.Namespace, **fields) -> A2DForMaskedDiffusion:
    """Qwen3-0.6B's shape with random weights."""
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=options.layers,
        num_attention_heads=QUERIES // 128,
        num_key_value_heads=KEYS // 128,
        head_dim=128,
        tie_word_embeddings=True,
        attn_implementation=options.attention,
        dtype=options.dtype,
    )
    torch.manual_seed(0)
    parent = AutoModelForCausalLM.from_config(config).to(options.device)
    return A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=options.vocabulary - 1, **fields)


def make_trainer(arm: str, model: A2DForMaskedDiffusion, rows: datasets.Dataset, batch: int, block_size: int):
    """The trainer of an arm, as a user would make it."""
    quiet = {"report_to": "none", "save_strategy": "no", "max_length": None, "per_device_train_batch_size": batch}
    folder = tempfile.mkdtemp()
    if arm == "mdlm":
        return MDLMTrainer(model, MDLMConfig(output_dir=folder, **quiet), train_dataset=rows)
    args = BD3LMConfig(output_dir=folder, block_size=block_size, complementary_views=arm != "bd3lm", **quiet)
    return BD3LMTrainer(model, args, train_dataset=rows)


def dense_mask(length: int, block_size: int | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask: all zeros for MDLM, the staircase over `[x_t ; x_0]` for block diffusion."""
    if block_size is None:
        return torch.zeros((1, 1, length, length), device=device, dtype=dtype)
    place = torch.arange(2 * length, device=device)
    clean, block = place >= length, place % length // block_size
    q_clean, k_clean, q_block, k_block = clean[:, None], clean[None], block[:, None], block[None]
    seen = (q_clean == k_clean) & (q_block == k_block)
    seen = seen | (~q_clean & k_clean & (q_block > k_block)) | (q_clean & k_clean & (q_block > k_block))
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


def reference_loss(trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The published step on the noise of ours: full logits, dense mask, two whole passes for two views."""
    noise = trainer.draw_noise(batch, trainer.args.seed)
    ids, labels, parent = batch["input_ids"], batch["labels"], trainer.model.backbone
    length, items = ids.shape[1], (labels != -100).sum()
    if isinstance(trainer, MDLMTrainer):
        views = [(noise.noised_ids_BL, noise.masked_BL, noise.elbo_weight_B[:, None])]
        block_size = None
    else:
        views = [
            (noise.noised_ids_BWL[:, w], noise.masked_BWL[:, w], noise.elbo_weight_BWL[:, w])
            for w in range(noise.views)
        ]
        block_size = noise.block_size
    total = 0.0
    for noised, masked, weight in views:
        mask = dense_mask(length, block_size, ids.device, parent.dtype).expand(ids.shape[0], 1, -1, -1)
        inputs = noised if block_size is None else torch.cat([noised, ids], dim=1)
        positions = torch.arange(length, device=ids.device).repeat(inputs.shape[1] // length)[None]
        logits = parent(input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :length].float().transpose(1, 2), labels, reduction="none", ignore_index=-100
        )
        total = total + (nll * masked * weight).sum() / len(views)
    return total / items


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """On a CPU the time that this process had it: other processes then disturb a timing little."""
    return time.perf_counter() if device == "cuda" else time.process_time()


def flop_ratio(arm: str, layers: int) -> float:
    """How many times fewer multiplications of matrices our step has, half of the tokens being masked."""
    keys_values, rest = 2 * HIDDEN * KEYS, 2 * HIDDEN * QUERIES + 3 * HIDDEN * FEED_FORWARD
    head, layer = HIDDEN * VOCABULARY, keys_values + rest
    passes, copies, ours_copies, read = {
        "mdlm": (1, 1, 1, 0.5),
        "bd3lm": (1, 2, 2, 0.5),
        "bd3lm_complementary": (2, 2, 3, 1.0),
    }[arm]
    published = passes * copies * (layers * layer + head)
    return published / (ours_copies * (layers - 1) * layer + ours_copies * keys_values + read * (rest + head))


def set_up(arm: str, options: argparse.Namespace):
    """A trainer and a batch of one arm."""
    fields = {} if arm == "mdlm" else {"objective": "bd3lm", "block_size": options.block_size}
    model = build_model(options, **fields)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, options.vocabulary - 1, (options.batch, options.length), generator=generator)
    rows = datasets.Dataset.from_list([{"input_ids": row} for row in ids.tolist()])
    trainer = make_trainer(arm, model, rows, options.batch, options.block_size)
    trainer.model.train()
    batch = {name: tensor.to(options.device) for name, tensor in next(iter(trainer.get_train_dataloader())).items()}
    return trainer, batch


def one_step(trainer, batch, reference: bool, device: str) -> tuple[float, float]:
    """Seconds and loss of forward and backward, as after an optimizer step: without gradients."""
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    wait(device)
    started = clock(device)
    loss = reference_loss(trainer, batch) if reference else trainer.compute_loss(trainer.model, batch)
    loss.backward()
    wait(device)
    return clock(device) - started, loss.item()


def time_arm(arm: str, options: argparse.Namespace) -> dict:
    """Both steps in turns, after one of each to warm up; and that they compute the same loss."""
    trainer, batch = set_up(arm, options)
    seconds = {False: [], True: []}
    losses = {}
    for repetition in range(options.repetitions + 1):
        for reference in (False, True):
            taken, losses[reference] = one_step(trainer, batch, reference, options.device)
            if repetition:
                seconds[reference].append(taken)
    if abs(losses[False] - losses[True]) > 1e-3 * abs(losses[True]):
        raise RuntimeError(f"The two steps of {arm} do not compute the same loss: {losses}.")
    ratios = [published / ours for ours, published in zip(seconds[False], seconds[True], strict=True)]
    return {
        "published_seconds": round(statistics.median(seconds[True]), 4),
        "ours_seconds": round(statistics.median(seconds[False]), 4),
        "speedup": round(statistics.median(ratios), 3),
        "smallest_speedup": round(min(ratios), 3),
        "masked_share": round(trainer.draw_noise(batch, trainer.args.seed).masked_BL.float().mean().item(), 3),
        "flop_ratio": round(flop_ratio(arm, options.layers), 3),
        "flop_ratio_28_layers": round(flop_ratio(arm, LAYERS), 3),
        "loss": losses[False],
        "all_seconds": {"ours": seconds[False], "published": seconds[True]},
    }


def memory_of(arm: str, reference: bool, length: int, options: argparse.Namespace) -> int:
    """Bytes that a step needs above weights and gradients, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory_of", arm, *(["--published"] if reference else [])]
    for name in ("layers", "vocabulary", "batch", "block_size", "device", "dtype", "attention"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run([*command, "--length", str(length)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The memory of {arm} could not be measured: {done.stderr[-800:]}")
    return int(done.stdout.split()[-1])


def measure_memory(arm: str, reference: bool, options: argparse.Namespace) -> int:
    trainer, batch = set_up(arm, options)
    if not reference:  # the first step of ours looks at the model once: its second is like all others
        trainer.compute_loss(trainer.model, {name: tensor[..., :64] for name, tensor in batch.items()})
    if options.device == "cuda":
        trainer.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(trainer, batch, reference, options.device)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = peak_of_cpu_allocator(lambda: one_step(trainer, batch, reference, options.device))
    return peak - sum(weight.grad.nbytes for weight in trainer.model.parameters() if weight.grad is not None)


def peak_of_cpu_allocator(step: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once that a step allocates, from torch's own record of its allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="all 28 layers, bfloat16, 8 rows of 1024, sdpa and flex")
    parser.add_argument("--layers", type=int, default=4, help="hidden layers of the timed model")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument(
        "--memory_lengths", type=int, nargs="*", default=[256, 1024], help="rows whose memory is measured"
    )
    parser.add_argument("--batch", type=int, default=1, help="rows per step")
    parser.add_argument("--block_size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "flex_attention"))
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU in bfloat16, dense; an H100's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory_of", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--published", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def write(report: dict, output: Path | None) -> None:
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".writing")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.rename(output)


def compare_steps(report: dict, options: argparse.Namespace) -> None:
    """Ours against the published step: time, then memory at every length asked for."""
    print(f"{'step':22}{'published':>11}{'ours':>9}{'faster':>9}{'least':>8}{'FLOPs, 28 layers':>20}")
    for arm in options.arms:
        result = time_arm(arm, options)
        report["arms"][arm] = result
        print(
            f"{arm:22}{result['published_seconds']:>10.2f}s{result['ours_seconds']:>8.2f}s{result['speedup']:>8.2f}x"
            f"{result['smallest_speedup']:>7.2f}x{result['flop_ratio_28_layers']:>19.2f}x",
            flush=True,
        )
        write(report, options.output)
    print(f"\n{'memory above weights':22}{'tokens':>11}{'published':>14}{'ours':>10}{'share':>9}")
    for arm in options.arms:
        memory = report["arms"][arm]["memory"] = {}
        for length in options.memory_lengths:
            published, ours = (memory_of(arm, which, length, options) for which in (True, False))
            memory[length] = {"published_bytes": published, "ours_bytes": ours, "share": round(ours / published, 3)}
            print(
                f"{arm:22}{length:>11}{published / 2**20:>10.0f} MiB{ours / 2**20:>6.0f} MiB{ours / published:>9.2f}",
                flush=True,
            )
            write(report, options.output)


def compare_attention(report: dict, options: argparse.Namespace) -> None:
    """On a GPU: tokens per second, model FLOP utilisation and peak memory of our step, sdpa against flex attention."""
    print(f"{'step':22}{'attention':>16}{'tokens/s':>12}{'MFU':>8}{'peak':>12}")
    for arm in options.arms:
        report["arms"][arm] = {}
        for options.attention in ("sdpa", "flex_attention"):
            trainer, batch = set_up(arm, options)
            torch.cuda.reset_peak_memory_stats()
            taken = [one_step(trainer, batch, False, "cuda")[0] for _ in range(options.repetitions + 2)][2:]
            tokens = batch["input_ids"].numel()
            per_second = tokens / statistics.median(taken)
            # What the objective needs: 6 per weight and token read, the trunk for every copy, the head once.
            copies = {"mdlm": 1, "bd3lm": 2, "bd3lm_complementary": 3}[arm]
            head = trainer.model.get_output_embeddings().weight.numel()
            trunk = sum(weight.numel() for weight in trainer.model.parameters()) - head
            read = 1.0 if arm == "bd3lm_complementary" else 0.5
            share = 6 * (copies * trunk + read * head) * per_second / (options.peak_tflops * 1e12)
            peak = torch.cuda.max_memory_allocated()
            report["arms"][arm][options.attention] = {
                "tokens_per_second": round(per_second), "mfu": round(share, 4), "peak_bytes": peak, "seconds": taken
            }  # fmt: skip
            print(
                f"{arm:22}{options.attention:>16}{per_second:>12.0f}{share:>8.1%}{peak / 2**20:>8.0f} MiB", flush=True
            )
            write(report, options.output)
            del trainer, batch
            gc.collect()
            torch.cuda.empty_cache()


def main() -> None:
    options = parse()
    if options.gpu:
        if not torch.cuda.is_available():
            sys.exit("bench_training: `--gpu` needs a CUDA device, and torch sees none.")
        options.layers, options.length, options.batch, options.dtype = LAYERS, 1024, 8, "bfloat16"
    for length in (options.length, *options.memory_lengths):
        if length % options.block_size:
            sys.exit(f"bench_training: `--block_size` {options.block_size} must divide the row length {length}.")
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.memory_of:
        print(measure_memory(options.memory_of, options.published, options))
        return
    shown = ("layers", "vocabulary", "length", "batch", "block_size", "dtype", "repetitions")
    report = {
        "command": "python scripts/bench_training.py " + " ".join(sys.argv[1:]),
        "machine": {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "setting": {name: getattr(options, name) for name in shown},
        "arms": {},
    }
    if options.gpu:
        compare_attention(report, options)
    else:
        compare_steps(report, options)


if __name__ == "__main__":
    main()
