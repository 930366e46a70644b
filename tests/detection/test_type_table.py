"""The checked-in table says what the installed transformers says, and the rules built on it agree with its models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a2d_hf.detection.attention_shape import read_experts, read_heads
from a2d_hf.detection.config_reading import ConfigView
from a2d_hf.detection.layers import KINDS, layer_kinds
from a2d_hf.detection.parameters import count_parameters
from a2d_hf.detection.type_table import _table, entry_of, proven_types, table_version


same_version = pytest.mark.skipif(
    table_version() != transformers.__version__,
    reason=f"the table is of transformers {table_version()}, installed is {transformers.__version__}",
)
DECODERS = [name for name, row in _table()["types"].items() if row["kind"] == "decoder"]


@same_version
def test_the_table_is_what_the_generator_writes():
    script = Path(__file__).resolve().parents[2] / "scripts" / "generate_type_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@same_version
def test_every_causal_type_has_a_kind():
    kinds = {name: entry_of(name).kind for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert "other" not in kinds.values() and "vision" not in kinds.values()
    count = {kind: sum(k == kind for k in kinds.values()) for kind in set(kinds.values())}
    assert count["decoder"] + count["multimodal"] > 130
    assert count["encoder_decoder"] == 14 and count["recurrent"] == 5


def test_what_is_proven_is_in_the_table():
    kinds = {name: row["kind"] for name, row in _table()["types"].items()}
    assert proven_types() and all(kinds.get(name) in ("decoder", "multimodal") for name in proven_types())


@same_version
@pytest.mark.parametrize("model_type", [name for name in DECODERS if entry_of(name).layers])
def test_layers_are_those_that_transformers_builds(model_type: str):
    entry = entry_of(model_type)
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        pytest.skip(f"transformers cannot build the default config: {error}")
    names = config.__dict__.get("layer_types") or getattr(config, "layers_block_type", None)
    if not names:
        pytest.skip("this type does not name its layers")
    # A window as long as the default context is no window to us, and still one to transformers.
    view = ConfigView({"max_position_embeddings": None, "model_max_length": None}, entry)
    assert layer_kinds(view) == [KINDS[name] for name in names]


# Types whose default config describes a model without attention, or a part that nothing can load alone.
NOTHING_TO_OPEN = {"bamba", "granitemoehybrid"}


@same_version
@pytest.mark.parametrize("kind", ["decoder", "multimodal"])
def test_every_config_that_transformers_saves_is_read(kind: str, verdict_of):
    refused = {}
    for name, row in _table()["types"].items():
        if row["kind"] != kind or "part_of" in row or name in NOTHING_TO_OPEN:
            continue
        config = CONFIG_MAPPING[name]()
        config.architectures = row.get("lm", [None])[:1] if row.get("lm") else None
        found = verdict_of(config.to_json_string(use_diff=False).encode())
        if found.verdict == "unsupported":
            refused[name] = [reason.message for reason in found.reasons]
    assert refused == {}


# One of each structure, for every run of the tests; the other types are left to the slow ones.
TYPICAL = {"bamba", "deepseek_v3", "falcon", "gemma3n_text", "gpt_oss", "jamba", "lfm2", "qwen3_moe", "qwen3_next"}
# Where a default config builds a model of another shape than its formula, and why.
NOT_COMPARABLE = {
    "hrm_text": "two stacks of layers that are run several times",
    "jetmoe": "attention is a mixture of experts too",
    "longcat_flash": "transformers allocates the experts that do nothing",
}


@same_version
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in proven_types() | TYPICAL else pytest.mark.slow)
        for name in DECODERS
        if entry_of(name).lm
    ],
)
def test_parameter_counts_are_those_of_the_models_that_transformers_builds(model_type: str):
    if model_type in NOT_COMPARABLE:
        pytest.skip(NOT_COMPARABLE[model_type])
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())
    except Exception as error:
        pytest.skip(f"transformers cannot build the default model: {type(error).__name__}")
    view = ConfigView({}, entry_of(model_type))
    kinds = layer_kinds(view)
    counted = count_parameters(view, kinds, read_heads(view), read_experts(view, kinds))
    assert counted.total == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.05)
