"""Shared fixtures: offline environment, tiny random models of every supported family, a tiny tokenizer, real data.

Owns what more than one test file needs. May import torch, transformers and tokenizers, never `a2d_hf` itself:
the parents built here are the independent side of every comparison.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path


# Set before anything imports huggingface_hub, transformers or trl, all of which read these at import time.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


REPOSITORY = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)

VOCAB_SIZE = 128
WINDOW = 8  # of the sliding-window families: shorter than the probes of most tests, so that it matters
CONTEXT = 128

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = _SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "num_hidden_layers": 2}

# One entry per family that must pass everything. Each differs where it matters for attention: grouped heads,
# windows, layer types, learned positions, parallel residuals, experts, tied and untied heads.
FAMILY_CONFIGS: dict[str, dict] = {
    "llama": _GATED | {"tie_word_embeddings": False},
    "qwen2": _GATED | {"tie_word_embeddings": True},
    "qwen3": _GATED | {"tie_word_embeddings": True, "head_dim": 8},
    "mistral": _GATED | {"tie_word_embeddings": False, "sliding_window": WINDOW},
    "gemma3_text": _GATED
    | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "opt": _SMALL | {"ffn_dim": 64, "num_hidden_layers": 2, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    "gpt_neox": _SMALL | {"intermediate_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False},
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
FAMILIES = tuple(FAMILY_CONFIGS)
WINDOWED_FAMILIES = ("mistral", "gemma3_text")


def tiny_config(family: str, **overrides):
    """The configuration of a tiny random member of `family`; a fresh deep copy at every call."""
    values = copy.deepcopy(FAMILY_CONFIGS[family]) | overrides
    return AutoConfig.for_model(family, **values)


def tiny_model(family: str, *, seed: int = 0, attn_implementation: str = "sdpa", **overrides) -> PreTrainedModel:
    """A tiny causal language model of `family` with seeded random weights, fp32, eval mode, no dropout.

    Weights are drawn wider than transformers' default of 0.02: with tiny layers that default leaves attention so
    weak that opening or closing an edge barely moves a logit, and a test of it could pass by rounding.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.15)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.05)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `VOCAB_SIZE` - 8 ids, trained offline on a few English sentences.

    Ids 0, 1 and 2 are pad, bos and eos as in `tiny_config`; there is no mask token; text round-trips exactly for
    the letters it was trained on and bytes outside them become `<unk>` (id 3).
    """
    sentences = [
        "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG!",
        "A model reads from left to right, one word at a time; a diffusion model fills in all the blanks at once.",
        "user assistant system question answer: 0 1 2 3 4 5 6 7 8 9 + - * / = ? ( ) [ ] { } ' \" , ; _ # @ % & < > \n",
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )


@pytest.fixture
def make_tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model` as a fixture, for tests that prefer not to import from conftest."""
    return tiny_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A fresh `tiny_tokenizer()`."""
    return tiny_tokenizer()


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Returns `make_checkpoint(family, with_tokenizer=True, **overrides) -> Path` of a saved AR checkpoint."""

    def build(family: str = "llama", *, with_tokenizer: bool = True, name: str | None = None, **overrides) -> Path:
        folder = tmp_path / (name or f"ar-{family}")
        tiny_model(family, **overrides).save_pretrained(folder)
        if with_tokenizer:
            tiny_tokenizer().save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora and checkpoints, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("A2D_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real data: set A2D_REAL_DATA to the folder, or put it at ../shared/data beside the repository")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("network") and os.environ.get("A2D_NETWORK_TESTS") != "1":
        pytest.skip("talks to the Hub: set A2D_NETWORK_TESTS=1 to run it")
