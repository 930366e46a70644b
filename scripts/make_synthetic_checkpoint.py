"""Makes a large random autoregressive checkpoint to try `a2d convert` on at real sizes: no download, little memory.

    python scripts/make_synthetic_checkpoint.py OUT --tokenizer FOLDER --gigabytes 4

A Qwen3-shaped model in bf16, in shards with an index, with the tokenizer of FOLDER. One tensor is in memory at a time.
The numbers are random, of the size that training starts from.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config

from a2d_hf.console import Console
from a2d_hf.layer_streaming import empty_parent
from a2d_hf.source import SAFETENSORS_INDEX, TOKENIZER_EXTRAS, TOKENIZER_FILES


def shape_for(gigabytes: float, vocabulary: int, tied: bool) -> Qwen3Config:
    """A configuration with the widths of Qwen3-4B and as many layers as fill the size."""
    config = Qwen3Config(
        vocab_size=-(-vocabulary // 128) * 128 + 128,
        hidden_size=2560,
        intermediate_size=9728,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        num_hidden_layers=1,
        dtype=torch.bfloat16,
    )
    one = sum(parameter.nbytes for parameter in empty_parent(config, torch.bfloat16).parameters())
    config.num_hidden_layers, config.layer_types = 2, None
    config = Qwen3Config(**{**config.to_dict(), "layer_types": None})
    two = sum(parameter.nbytes for parameter in empty_parent(config, torch.bfloat16).parameters())
    layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
    return Qwen3Config(**{**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})


def shards(tensors: dict[str, torch.Tensor], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes."""
    groups, used = [[]], 0
    for name, tensor in tensors.items():
        if groups[-1] and used + tensor.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += tensor.nbytes
    return groups


def write_shard(file: Path, tensors: dict[str, torch.Tensor], seed: int, bar) -> None:
    """Writes one safetensors file: the header, then tensor after tensor, made as it is written."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for rows in torch.empty(tensor.shape, device="meta").split(4096):
                values = torch.ones(rows.shape, dtype=torch.bfloat16)
                if tensor.ndim > 1:
                    values = torch.empty(rows.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                stream.write(values.view(torch.uint8).numpy())
                bar.advance(values.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the weights")
    parser.add_argument("--shard-gigabytes", type=float, default=1.0, help="largest shard")
    parser.add_argument("--tied", action="store_true", help="tie the output embedding to the input embedding")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True)
    for name in (*TOKENIZER_FILES, *TOKENIZER_EXTRAS):
        if (args.tokenizer / name).is_file():
            shutil.copyfile(args.tokenizer / name, args.out / name)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = shape_for(args.gigabytes, max(tokenizer.get_vocab().values()) + 1, args.tied)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(args.out)
    model = empty_parent(config, torch.bfloat16)
    tensors = dict(model.named_parameters())  # a tied head comes once
    groups = shards(tensors, int(args.shard_gigabytes * 1e9))
    total = sum(tensor.nbytes for tensor in tensors.values())
    placed = {}
    console = Console()
    with console.progress("writing random weights", total, "byte") as bar:
        for number, names in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            write_shard(args.out / file, {name: tensors[name] for name in names}, args.seed + number, bar)
            placed.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (args.out / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    console.line(f"{args.out}: {total:,} bytes in {len(groups)} shards, {config.num_hidden_layers} layers")


if __name__ == "__main__":
    main()
