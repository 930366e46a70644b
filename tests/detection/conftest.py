"""Helpers of the detection tests: a config on disk, its verdict, small weight files written by hand."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from a2d_hf.detection import Detection, detect


# A small model of any type that follows the usual field names; each test states what it changes.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


def llama(**changes: Any) -> dict[str, Any]:
    """A small Llama config."""
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SIZES | changes


def write_safetensors(file: Path, tensors: dict[str, tuple[str, list[int]]], cut: int = 0) -> None:
    """A safetensors file of zeros, from the format's own definition; `cut` bytes are missing at its end."""
    width = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I32": 4}
    header, start = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = width[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(start)
    file.write_bytes(content[: len(content) - cut])


@pytest.fixture
def verdict_of(tmp_path: Path) -> Callable[..., Detection]:
    """`verdict_of(config) -> Detection`: writes the config (an object, or the raw bytes of a file) and detects it."""

    def run(config: dict[str, Any] | bytes, **options: Any) -> Detection:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        content = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "config.json").write_bytes(content)
        return detect(folder, **options)

    return run


def codes(found: Detection) -> list[str]:
    """The codes of the reasons."""
    return [reason.code for reason in found.reasons]
