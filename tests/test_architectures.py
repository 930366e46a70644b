"""The architecture matrix: a representative part of it here, the whole of it under the `slow` marker."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING

from a2d_hf.architecture_checks import causal_types, check_type, tiny_parent
from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
from a2d_hf.modeling.gates import reach_gate
from a2d_hf.shrinking import lost_structure, shrink_config
from scripts.architecture_matrix import CORE, EVERY, ROOT, passes


# One of each kind: soft-caps, sinks, latent attention, chunks, parallel blocks, its own causal buffer, banded buffers,
# ALiBi, learned positions, experts, shared key-value layers, indexed attention.
EXACT = ("cohere2", "deepseek_v3", "falcon", "gemma2", "gemma3n_text", "gpt_neo", "gpt_oss", "llama4_text", "olmoe")
HYBRID = ("bamba", "qwen3_next")
PUBLISHED = json.loads((ROOT / "docs" / "architectures.json").read_text())


@pytest.mark.parametrize("model_type", EXACT)
def test_a_representative_of_each_kind_passes_every_column(model_type):
    row = check_type(model_type)
    assert passes(row, EVERY), {key: value for key, value in row.items() if value is False or "error" in key}


@pytest.mark.parametrize("model_type", HYBRID)
def test_a_hybrid_opens_its_attention_layers_and_says_how_many(model_type):
    row = check_type(model_type)
    assert row["verdict"] == "hybrid" and passes(row, CORE), row
    assert 0 < row["open_layers"] < row["layers"]


@pytest.mark.parametrize("model_type", HYBRID)
def test_a_recurrence_refuses_what_it_would_get_wrong(model_type):
    """A recurrent layer reads the clean copy as if it followed the noisy one, and one document into the next."""
    with pytest.raises(ValueError, match="2 of 4 layers open|1 of 4 layers open"):
        A2DForMaskedDiffusion.from_causal_lm(tiny_parent(model_type), mask_token_id=120)
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_parent(model_type), mask_token_id=120, allow_hybrid=True)
    x = torch.randint(3, 100, (1, 12))
    for arguments in ({"attention_pattern": AttentionPattern.bd3lm(3)}, {"document_ids": torch.arange(12)[None] // 6}):
        with pytest.raises(ValueError, match="recurrent"):
            model(x, **arguments)


def test_an_attention_layer_of_a_hybrid_that_stays_closed_is_caught():
    """Only the recurrent layers have leave to stay causal."""
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_parent("qwen3_next"), mask_token_id=120, allow_hybrid=True)
    assert reach_gate(model).passed
    index = [i for i, kind in enumerate(model.config.text_config.layer_types) if kind == "full_attention"][0]
    attention = model.backbone.model.layers[index].self_attn
    forward = attention.forward

    def causal_forward(hidden_states, position_embeddings, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        future = torch.ones(length, length).triu(1).bool()
        return forward(hidden_states, position_embeddings, torch.zeros(length, length).masked_fill(future, -1e9))

    attention.forward = causal_forward
    assert not reach_gate(model).passed


@pytest.mark.parametrize("model_type", ["mamba", "bert", "bart", "rwkv"])
def test_what_has_nothing_to_open_is_refused_with_a_reason(model_type):
    row = check_type(model_type)
    assert row["verdict"] == "unsupported" and row["codes"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_types())
def test_every_type_does_what_the_published_table_says(model_type):
    published = {row["type"]: row for row in PUBLISHED["rows"]}[model_type]
    row = check_type(model_type)
    assert passes(row, CORE) == passes(published, CORE)
    assert passes(row, EVERY) == passes(published, EVERY)


def test_the_published_table_is_complete_and_large_enough():
    rows = PUBLISHED["rows"]
    assert [row["type"] for row in rows] == causal_types()
    converts = [row for row in rows if row.get("verdict") in ("supported", "hybrid")]
    assert sum(passes(row, CORE) for row in converts) >= 135
    assert sum(passes(row, EVERY) for row in converts) >= 110
    for row in rows:
        unexplained = row not in converts and not row.get("codes") and not row.get("error")
        assert not unexplained, f"{row['type']} is neither converted nor refused with a reason"


def test_a_row_with_lost_structure_does_not_count():
    row = {column: True for column in EVERY}
    assert passes(row, EVERY)
    assert not passes(row | {"lost": ["sliding_window"]}, EVERY)
    assert not passes(row | {"cache": False}, EVERY)
    assert not passes(row | {"error": "no"}, EVERY)


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "qwen3_next", "llama4_text", "gemma3n_text"])
def test_shrinking_keeps_windows_experts_and_kinds_of_layers(model_type):
    full = CONFIG_MAPPING[model_type]()
    assert lost_structure(full, shrink_config(full)) == []


def test_lost_structure_is_noticed():
    full = CONFIG_MAPPING["mistral"]()
    assert lost_structure(full, shrink_config(full, sliding_window=None)) == ["sliding_window"]
    experts = CONFIG_MAPPING["mixtral"]()
    assert lost_structure(experts, shrink_config(experts, num_local_experts=1)) == ["num_local_experts"]
