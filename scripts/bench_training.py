"""Times one training step of this project against the step that is published: logits of every position, a dense mask.

    OMP_NUM_THREADS=1 python scripts/bench_training.py --output benchmarks/training_cpu.json

The published step is written here, from its definition: the doubled sequence (or, for two views, two of them), a dense
mask built edge by edge on tensors, the output head over every position, cross-entropy in fp32 over all of it. Ours is
the trainer's own `compute_loss`. Both run forward and backward of the same model, with the same rows, in turns, in one
process; the numbers are ratios of medians. Peak memory is what a step holds beyond weights and gradients, in a process
of its own per arm. The model has the width and vocabulary of Qwen3-0.6B and fewer layers (`--layers 28` for all
of them).
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
from pathlib import Path

import datasets
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from a2d_hf import A2DForMaskedDiffusion, BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer


ARMS = ("mdlm", "bd3lm", "bd3lm_complementary")


def build_model(layers: int, vocabulary: int, device: str, **fields) -> A2DForMaskedDiffusion:
    """Qwen3-0.6B's shape with random weights."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    parent = Qwen3ForCausalLM(config).to(device)
    return A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=vocabulary - 1, **fields)


def make_trainer(arm: str, model: A2DForMaskedDiffusion, rows: datasets.Dataset, batch: int, block_size: int):
    """The trainer of an arm, as a user would make it."""
    quiet = {"report_to": "none", "save_strategy": "no", "max_length": None, "per_device_train_batch_size": batch}
    folder = tempfile.mkdtemp()
    if arm == "mdlm":
        return MDLMTrainer(model, MDLMConfig(output_dir=folder, **quiet), train_dataset=rows)
    args = BD3LMConfig(output_dir=folder, block_size=block_size, complementary_views=arm != "bd3lm", **quiet)
    return BD3LMTrainer(model, args, train_dataset=rows)


def dense_mask(length: int, block_size: int | None, device: torch.device) -> torch.Tensor:
    """Additive fp32 mask: all zeros for MDLM, the staircase over `[x_t ; x_0]` for block diffusion."""
    if block_size is None:
        return torch.zeros((1, 1, length, length), device=device)
    place = torch.arange(2 * length, device=device)
    clean, block = place >= length, place % length // block_size
    q_clean, k_clean, q_block, k_block = clean[:, None], clean[None], block[:, None], block[None]
    seen = (q_clean == k_clean) & (q_block == k_block)
    seen = seen | (~q_clean & k_clean & (q_block > k_block)) | (q_clean & k_clean & (q_block > k_block))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


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
        mask = dense_mask(length, block_size, ids.device).expand(ids.shape[0], 1, -1, -1)
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


def resident_bytes(name: str) -> int:
    """A number of /proc/self/status, for example `VmHWM`, the most memory this process ever held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def set_up(arm: str, options: argparse.Namespace):
    """A trainer and a batch of one arm, its gradients allocated."""
    fields = {} if arm == "mdlm" else {"objective": "bd3lm", "block_size": options.block_size}
    model = build_model(options.layers, options.vocabulary, options.device, **fields)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, options.vocabulary - 1, (options.batch, options.length), generator=generator)
    rows = datasets.Dataset.from_list([{"input_ids": row} for row in ids.tolist()])
    trainer = make_trainer(arm, model, rows, options.batch, options.block_size)
    trainer.model.train()
    batch = {name: tensor.to(options.device) for name, tensor in next(iter(trainer.get_train_dataloader())).items()}
    for weight in trainer.model.parameters():
        weight.grad = torch.zeros_like(weight)
    return trainer, batch


def one_step(trainer, batch, reference: bool, device: str) -> tuple[float, float]:
    """Seconds and loss of forward and backward."""
    gc.collect()
    wait(device)
    started = clock(device)
    loss = reference_loss(trainer, batch) if reference else trainer.compute_loss(trainer.model, batch)
    loss.backward()
    wait(device)
    return clock(device) - started, loss.item()


def time_arm(arm: str, options: argparse.Namespace) -> dict:
    """Medians of both steps, in turns, after one of each to warm up; and that they compute the same loss."""
    trainer, batch = set_up(arm, options)
    seconds = {False: [], True: []}
    losses = {}
    for repetition in range(options.repetitions + 1):
        for reference in (False, True):
            taken, losses[reference] = one_step(trainer, batch, reference, options.device)
            if repetition:
                seconds[reference].append(taken)
    ours, published = (statistics.median(seconds[reference]) for reference in (False, True))
    if abs(losses[False] - losses[True]) > 1e-3 * abs(losses[True]):
        raise RuntimeError(f"The two steps of {arm} do not compute the same loss: {losses}.")
    return {
        "published_seconds": round(published, 4),
        "ours_seconds": round(ours, 4),
        "speedup": round(published / ours, 3),
        "loss": losses[False],
        "all_seconds": {"ours": seconds[False], "published": seconds[True]},
    }


def memory_of(arm: str, reference: bool, options: argparse.Namespace) -> int:
    """Bytes that a step holds beyond weights and gradients, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory_of", arm, *(["--published"] if reference else [])]
    for name in ("layers", "vocabulary", "length", "batch", "block_size", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The memory of {arm} could not be measured: {done.stderr[-800:]}")
    return int(done.stdout.split()[-1])


def measure_memory(arm: str, reference: bool, options: argparse.Namespace) -> int:
    trainer, batch = set_up(arm, options)
    gc.collect()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(trainer, batch, reference, options.device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forgets the peak so far
    before = resident_bytes("VmRSS")
    one_step(trainer, batch, reference, options.device)
    return resident_bytes("VmHWM") - before


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="hidden layers of the timed model")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--batch", type=int, default=1, help="rows per step")
    parser.add_argument("--block_size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory_of", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--published", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.length % options.block_size:
        sys.exit(f"bench_training: `--block_size` {options.block_size} must divide `--length` {options.length}.")
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.memory_of:
        print(measure_memory(options.memory_of, options.published, options))
        return
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
        "setting": {
            name: getattr(options, name) for name in ("layers", "vocabulary", "length", "batch", "block_size")
        },
        "arms": {},
    }
    print(f"{'step':22}{'published':>12}{'ours':>10}{'faster':>9}{'published':>13}{'ours':>9}{'memory':>9}")
    for arm in options.arms:
        result = time_arm(arm, options)
        result["published_bytes"], result["ours_bytes"] = (memory_of(arm, which, options) for which in (True, False))
        result["memory_share"] = round(result["ours_bytes"] / result["published_bytes"], 3)
        report["arms"][arm] = result
        print(
            f"{arm:22}{result['published_seconds']:>11.2f}s{result['ours_seconds']:>9.2f}s{result['speedup']:>8.2f}x"
            f"{result['published_bytes'] / 2**20:>9.0f} MiB{result['ours_bytes'] / 2**20:>5.0f} MiB"
            f"{result['memory_share']:>8.2f}x",
            flush=True,
        )
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            unfinished = options.output.with_suffix(".writing")
            unfinished.write_text(json.dumps(report, indent=2) + "\n")
            unfinished.rename(options.output)


if __name__ == "__main__":
    main()
