"""A folder in which the Hub names of the recipes' YAMLs are folders: tiny models of the same architectures, few rows.

Run from inside it, a YAML means what it says, name for name: `Qwen/Qwen3-0.6B` is a folder with a tiny Qwen3,
`HuggingFaceTB/smoltalk` one with a configuration `all` and a split `train`, whose rows have the real set's columns.
"""

import json
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from a2d_hf.shrinking import shrink_config
from tests.conftest import tiny_tokenizer


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
QWEN3 = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
# What the real config.json files say, as far as it decides the architecture.
MODELS: dict[str, tuple[str, dict]] = {
    "openai-community/gpt2": ("gpt2", {}),
    "openai-community/gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        "qwen2",
        {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "tie_word_embeddings": True,
        },
    ),
    "facebook/galactica-125m": (
        "opt",
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "meta-llama/Llama-3.2-1B": (
        "llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen3-0.6B": ("qwen3", QWEN3 | {"intermediate_size": 3072, "tie_word_embeddings": True}),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", QWEN3 | {"intermediate_size": 3072, "tie_word_embeddings": True}),
    "Qwen/Qwen3.5-27B-text": (
        "qwen3_5_text",
        {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 24, "num_key_value_heads": 4},
    ),
}
CHAT_MODELS = ("Instruct", "Qwen3-0.6B", "Qwen3.5")

MESSAGES = [{"role": "user", "content": "question 1 2 3?"}, {"role": "assistant", "content": "answer: 3 2 1"}]
TEXT = "The quick brown fox jumps over the lazy dog. " * 4
PAIR = {"instruction": "question 1 2?", "output": "answer: 2 1", "tag": "code"}
# name -> configuration -> split -> a row, with the columns of the real set.
DATASETS: dict[str, dict[str, dict[str, dict]]] = {
    "HuggingFaceFW/fineweb": {"sample-10BT": {"train": {"text": TEXT, "id": "1", "url": "-", "token_count": 40}}},
    "HuggingFaceFW/fineweb-edu": {"sample-10BT": {"train": {"text": TEXT, "id": "1", "url": "-", "score": 4.0}}},
    "CShorten/ML-ArXiv-Papers": {"default": {"train": {"Unnamed: 0": 1, "title": "a fox", "abstract": TEXT}}},
    "Trelis/tiny-shakespeare": {"default": {"train": {"Text": TEXT}, "test": {"Text": TEXT}}},
    "trl-lib/Capybara": {
        "default": {split: {"source": "x", "messages": MESSAGES, "num_turns": 1} for split in ("train", "test")}
    },
    "tatsu-lab/alpaca": {"default": {"train": {"instruction": "add", "input": "1 2", "output": "3", "text": "add 3"}}},
    "allenai/tulu-3-sft-mixture": {"default": {"train": {"id": "1", "messages": MESSAGES, "source": "x"}}},
    "HuggingFaceTB/smoltalk": {
        name: {split: {"messages": MESSAGES, "source": "x"} for split in ("train", "test")}
        for name in ("all", "smol-magpie-ultra")
    },
    "OpenCoder-LLM/opc-sft-stage1": {"filtered_infinity_demo": {"train": PAIR}},
    "OpenCoder-LLM/opc-sft-stage2": {"educational_instruct": {"train": PAIR | {"code": "x", "testcase": ["1"]}}},
    "nvidia/Nemotron-Post-Training-Dataset-v1": {
        "default": {split: {"uuid": "1", "category": split, "messages": MESSAGES} for split in ("code", "math")}
    },
    "nvidia/Llama-Nemotron-Post-Training-Dataset": {
        "SFT": {
            split: {"input": MESSAGES[:1], "output": "answer: 3 2 1", "category": split, "license": "cc"}
            for split in ("code", "math", "science", "chat", "safety")
        }
    },
}
ROWS = 24


def real_config(name: str) -> PreTrainedConfig:
    """The configuration of a model as large as the real one."""
    model_type, values = MODELS[name]
    return AutoConfig.for_model(model_type, **values)


def write_model(folder: Path, name: str) -> None:
    """A tiny model of the architecture of `name`, with a tokenizer, in `folder`."""
    ids = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = shrink_config(real_config(name), **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if any(word in name for word in CHAT_MODELS) and not name.endswith("Base"):
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_dataset(folder: Path, name: str) -> None:
    """A few rows in the form of the data set `name`, with its configurations and splits, in `folder`."""
    listed = []
    for config, splits in DATASETS[name].items():
        (folder / config).mkdir(parents=True)
        files = []
        for split, row in splits.items():
            (folder / config / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * ROWS)
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"configs": listed}) + "---\n")
