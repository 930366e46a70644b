"""What attention in pieces saves a step of block diffusion on a CPU: forward and backward pass, with and without.

    OMP_NUM_THREADS=1 python scripts/bench_pieced_attention.py --json benchmarks/pieced_attention_cpu.json

Owns that comparison. Both steps are of the same small Llama (random weights; the shape of stories260K, where attention
is most of the work, or a wider one) on the same tokens, in turns; in CPU time, the least of several repetitions.
"""

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from a2d_hf import A2DForMaskedDiffusion
from a2d_hf.atomic_files import write_json
from a2d_hf.modeling import AttentionPattern
from a2d_hf.provenance import hardware, library_versions


SHAPES = {
    "narrow": {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 8, "num_key_value_heads": 4},
    "wide": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4},
}
CASES = [(shape, length, views) for shape in SHAPES for length in (256, 1024) for views in (1, 4)]
BLOCK_SIZE, MASK_ID = 4, 511


def model_of(shape: str) -> A2DForMaskedDiffusion:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, num_hidden_layers=5, tie_word_embeddings=True, **SHAPES[shape])
    fields = {"objective": "bd3lm", "block_size": BLOCK_SIZE, "clean_context": "causal"}
    return A2DForMaskedDiffusion.from_causal_lm(LlamaForCausalLM(config), mask_token_id=MASK_ID, **fields).train()


def step_seconds(model: A2DForMaskedDiffusion, inputs: dict[str, Any], whole: bool) -> float:
    cut = mock.patch("a2d_hf.modeling.attention_interface.pieces_of", lambda mask, copies: None)
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    with cut if whole else contextlib.nullcontext():
        model(**inputs).loss.backward()
    return time.process_time() - began


def measure(shape: str, length: int, views: int, repeats: int) -> dict[str, Any]:
    model, generator = model_of(shape), torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (1, length), generator=generator)
    masked = torch.rand((1, views * length), generator=generator) < 0.6
    noisy = ids.repeat(1, views).masked_fill(masked, MASK_ID)
    labels = torch.cat([ids.repeat(1, views).masked_fill(~masked, -100), torch.full_like(ids, -100)], dim=1)
    pattern = AttentionPattern.bd3lm(BLOCK_SIZE, clean_context="causal", views=views)
    inputs = {"input_ids": torch.cat([noisy, ids], dim=1), "labels": labels, "attention_pattern": pattern}
    for whole in (True, False):
        step_seconds(model, inputs, whole)
    times = {whole: [] for whole in (True, False)}
    for _ in range(repeats):
        for whole, found in times.items():
            found.append(step_seconds(model, inputs, whole))
    whole, pieces = min(times[True]), min(times[False])
    return {"shape": shape, "length": length, "views": views, "whole_s": whole, "pieces_s": pieces}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    args = parser.parse_args()
    logging.set_verbosity_error()
    rows = []
    print("| model | tokens | noisy views | one call | in pieces | faster |\n|---|---|---|---|---|---|")
    for shape, length, views in CASES:
        row = measure(shape, length, views, args.repeats)
        rows.append(row)
        ratio = row["whole_s"] / row["pieces_s"]
        print(
            f"| {shape} | {length} | {views} | {row['whole_s']:.2f} s | {row['pieces_s']:.2f} s | {ratio:.2f}x |",
            flush=True,
        )
    write_json(args.json, {"versions": library_versions(), "machine": hardware(), "rows": rows})


if __name__ == "__main__":
    main()
