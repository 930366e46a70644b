"""A folder in which the Hub names of the recipes' YAMLs are folders: tiny models of the same architectures, few rows.

Run from inside it, a YAML means what it says, name for name: `Qwen/Qwen3-0.6B` is a folder with a tiny Qwen3,
`HuggingFaceTB/smoltalk` one with a configuration `all` and a split `train`, whose rows have the real set's columns.
"""

from pathlib import Path

import datasets
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from a2d_hf.shrinking import shrink_config
from tests.conftest import CONTEXT, tiny_tokenizer


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

# The special tokens that the real tokenizers have; the others are missing there too.
END = "</s>"
SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "openai-community/gpt2": {"bos_token": END, "eos_token": END, "unk_token": END},
    "openai-community/gpt2-medium": {"bos_token": END, "eos_token": END, "unk_token": END},
    "Qwen/Qwen2.5-1.5B-Instruct": {"eos_token": END, "pad_token": "<pad>"},
    "facebook/galactica-125m": {},
    "meta-llama/Llama-3.2-1B": {"bos_token": "<s>", "eos_token": END},
    "Qwen/Qwen3-0.6B": {"eos_token": END, "pad_token": "<pad>"},
    "Qwen/Qwen3-0.6B-Base": {"eos_token": END, "pad_token": END},
    "Qwen/Qwen3.5-27B-text": {"eos_token": END, "pad_token": "<pad>"},
}

MESSAGES = [{"content": "question 1 2 3?", "role": "user"}, {"content": "answer: 3 2 1", "role": "assistant"}]
TEXT = "The quick brown fox jumps over the lazy dog. " * 4
WEB = {"id": "1", "dump": "x", "url": "-", "file_path": "-", "language": "en", "language_score": 1.0, "token_count": 9}
PAIR = {"instruction": "question 1 2?", "output": "```python answer: 2 1"}
TESTED = {"seq_id": 1, **PAIR, "code": "x", "entry_point": "x", "testcase": ["1"]}
# name -> configuration -> split -> a row, with the columns of the real set as its card and its readers name them.
DATASETS: dict[str, dict[str, dict[str, dict]]] = {
    "HuggingFaceFW/fineweb": {"sample-10BT": {"train": {"text": TEXT, "date": "x", **WEB}}},
    "HuggingFaceFW/fineweb-edu": {"sample-10BT": {"train": {"text": TEXT, **WEB, "score": 4.0, "int_score": 4}}},
    "CShorten/ML-ArXiv-Papers": {
        "default": {"train": {"Unnamed: 0.1": 0, "Unnamed: 0": 0.0, "title": "a fox", "abstract": TEXT}}
    },
    "Trelis/tiny-shakespeare": {"default": {"train": {"Text": TEXT}, "test": {"Text": TEXT}}},
    "runs/own-text": {"default": {"train": {"input_ids": list(range(10, 70))}}},  # write_parent_text.py's
    "trl-lib/Capybara": {
        "default": {split: {"source": "x", "messages": MESSAGES, "num_turns": 1} for split in ("train", "test")}
    },
    "tatsu-lab/alpaca": {"default": {"train": {"instruction": "add", "input": "1 2", "output": "3", "text": "add 3"}}},
    "allenai/tulu-3-sft-mixture": {"default": {"train": {"id": "1", "messages": MESSAGES, "source": "x"}}},
    "HuggingFaceTB/smoltalk": {
        "all": {split: {"messages": MESSAGES, "source": "x"} for split in ("train", "test")},
        "smol-magpie-ultra": {
            split: {"messages": MESSAGES, "category": "x", "difficulty": "easy", "quality": "good"}
            for split in ("train", "test")
        },
    },
    "OpenCoder-LLM/opc-sft-stage1": {
        name: {"train": PAIR}
        for name in ("filtered_infinity_instruct", "largescale_diverse_instruct", "realuser_instruct")
    },
    "OpenCoder-LLM/opc-sft-stage2": {
        "educational_instruct": {"train": TESTED},
        "evol_instruct": {"train": PAIR},
        "mceval_instruct": {"train": PAIR},
        "package_instruct": {"train": PAIR},
    },
    "nvidia/OpenCodeInstruct": {
        "train": {
            "train": {
                "id": "1",
                "input": "question 1 2?",
                "output": "answer: 2 1",
                "domain": "generic",
                "generation_algorithm": "x",
                "llm_judgement": "{}",
                "unit_tests": "[]",
                "tests_execution_status": "[]",
                "average_test_score": "1.0",
            }
        }
    },
    "nvidia/Llama-Nemotron-Post-Training-Dataset": {
        "SFT": {
            split: {
                "input": [{"role": "user", "content": "question 1 2 3?"}],
                "output": "answer: 3 2 1",
                "category": split,
                "license": "cc",
                "reasoning": "on",
                "generator": "x",
                "used_in_training": ["Ultra"],
                "version": "v1.1",
                "system_prompt": "detailed thinking on",
            }
            for split in ("code", "math", "science", "chat", "safety")
        },
        "RL": {"instruction_following": {"input": MESSAGES[:1], "args": "{}", "category": "x"}},
    },
}
# How the real set is stored; parquet where nothing is said.
STORED_AS = {
    "CShorten/ML-ArXiv-Papers": "csv",
    "Trelis/tiny-shakespeare": "csv",
    "nvidia/Llama-Nemotron-Post-Training-Dataset": "jsonl",
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
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, model_max_length=CONTEXT, **SPECIAL_TOKENS[name]
    )
    if any(word in name for word in CHAT_MODELS) and not name.endswith("Base"):
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_dataset(folder: Path, name: str) -> None:
    """A few rows in the form of the data set `name`, with its configurations and splits, in `folder`."""
    listed, ending = [], STORED_AS.get(name, "parquet")
    for config, splits in DATASETS[name].items():
        (folder / config).mkdir(parents=True)
        files = []
        for split, row in splits.items():
            rows = datasets.Dataset.from_list([row] * ROWS)
            write = {"parquet": rows.to_parquet, "csv": rows.to_csv, "jsonl": rows.to_json}[ending]
            write(folder / config / f"{split}.{ending}")
            files.append({"split": split, "path": f"{config}/{split}.{ending}"})
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"configs": listed}) + "---\n")
