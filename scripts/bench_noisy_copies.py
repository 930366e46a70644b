"""What a step of block diffusion saves by leaving prompts out of its noisy copies: forward and backward pass.

    OMP_NUM_THREADS=1 python scripts/bench_noisy_copies.py --json benchmarks/noisy_copies_cpu.json

Owns that comparison. Both steps are the trainer's own `compute_loss` on the same rows and noise of a small Llama with
random weights, in turns, in CPU time, the least of several repetitions; one reads whole noisy copies, the other only
their blocks with a target.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from a2d_hf import A2DForMaskedDiffusion, BD3LMConfig, BD3LMTrainer
from a2d_hf.atomic_files import write_json
from a2d_hf.provenance import hardware, library_versions
from a2d_hf.trainers.noisy_copies import NoisyCopies


WIDTHS = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4}
VOCABULARY, MASK_ID, BLOCK_SIZE, ROWS = 8192, 8191, 32, 1
# A full copy, chats of short and long prompts, and the last part of a row that is trained in four steps.
CASES = [(prompt, views) for prompt in (0.0, 0.5, 0.75, 0.9) for views in (1, 4)]


def trainer_of(prompt: float, views: int, length: int, folder: str) -> BD3LMTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, tie_word_embeddings=True, **WIDTHS)
    model = A2DForMaskedDiffusion.from_causal_lm(
        LlamaForCausalLM(config), mask_token_id=MASK_ID, objective="bd3lm", block_size=BLOCK_SIZE
    )
    ids, first = torch.randint(3, MASK_ID, (ROWS, length)).tolist(), round(prompt * length)
    rows = [{"input_ids": row, "labels": [-100] * first + row[first:], "row_id": i} for i, row in enumerate(ids)]
    return BD3LMTrainer(
        model,
        BD3LMConfig(
            output_dir=folder,
            max_length=length,
            nested_views=views,
            per_device_train_batch_size=ROWS,
            report_to="none",
            use_cpu=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )


def step_seconds(trainer: BD3LMTrainer, batch: dict[str, torch.Tensor], whole: bool) -> float:
    trainer.model.train().zero_grad(set_to_none=True)
    keep_all = mock.patch.object(NoisyCopies, "of", classmethod(lambda cls, rows: None))
    began = time.process_time()
    with keep_all if whole else contextlib.nullcontext():
        trainer.compute_loss(trainer.model, batch).backward()
    return time.process_time() - began


def measure(prompt: float, views: int, length: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(prompt, views, length, folder)
        batch = next(iter(trainer.get_train_dataloader()))
        times = {whole: [] for whole in (True, False)}
        for repeat in range(repeats + 1):
            for whole, found in times.items():
                seconds = step_seconds(trainer, batch, whole)
                if repeat > 0:  # the first is warming up
                    found.append(seconds)
    return {"prompt": prompt, "views": views, "whole_s": min(times[True]), "kept_s": min(times[False])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    args = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    rows = []
    print("| prompt | noisy views | whole copies | blocks with a target | faster |\n|---|---|---|---|---|")
    for prompt, views in CASES:
        row = measure(prompt, views, args.length, args.repeats)
        rows.append(row)
        ratio = row["whole_s"] / row["kept_s"]
        print(
            f"| {prompt:.0%} | {views} | {row['whole_s']:.2f} s | {row['kept_s']:.2f} s | {ratio:.2f}x |", flush=True
        )
    facts = {"length": args.length, "versions": library_versions(), "machine": hardware()}
    write_json(args.json, facts | {"rows": rows})


if __name__ == "__main__":
    main()
