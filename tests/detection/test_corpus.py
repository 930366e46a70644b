"""Real configs of published models, each with the verdict it must get."""

import json
from pathlib import Path

import pytest

from a2d_hf.detection import detect

from .conftest import codes


@pytest.mark.real_data
def test_every_real_config_gets_its_verdict_for_the_right_reason(real_data: Path):
    expected = json.loads((real_data / "configs" / "expected.json").read_text())
    wrong = {}
    for name, wanted in expected.items():
        found = detect(real_data / "configs" / name)
        right = found.verdict == wanted["verdict"] and set(codes(found)) <= set(wanted.get("codes", ()))
        if not right or (found.verdict == "unsupported") != bool(found.reasons):
            wrong[name] = (found.verdict, codes(found))
    assert len(expected) >= 67
    assert wrong == {}


@pytest.mark.real_data
def test_the_hybrid_of_27_billion_opens_16_of_64_layers(real_data: Path):
    found = detect(real_data / "configs" / "qwen3_5--Qwen_Qwen3.5-27B.json")
    assert found.to_dict()["layers"]["summary"].startswith("16 of 64 layers open")
    assert found.text_only and "attn.linear" in found.capabilities


# What the publishers state, in billions of parameters: total and active per token (with embeddings).
PUBLISHED = {
    "llama--meta-llama_Meta-Llama-3.1-8B.json": (8.03, 8.03),
    "llama--meta-llama_Meta-Llama-3.1-405B.json": (405.85, 405.85),
    "mixtral--mistralai_Mixtral-8x7B-v0.1.json": (46.7, 12.9),
    "olmoe--olmoe_a2d.json": (6.92, 1.28),
    "llama4--llama4.json": (400, 17),
    "gpt_oss--openai_gpt-oss-120b.json": (116.8, 5.7),
    "mimo_v2_flash--XiaomiMiMo_MiMo-V2-Flash.json": (309, 15),
    "qwen3_5_moe--Qwen_Qwen3.5-35B-A3B.json": (35, 3.4),
    "qwen2--qwen2.5_72b.json": (72.7, 72.7),
    "gemma2--mlc_gemma2_9b.json": (9.24, 9.24),
    "falcon--falcon-7b-instruct.json": (6.92, 6.92),
    "gpt2--gpt2-xl.json": (1.56, 1.56),
    "nemotron_h--nvidia_Nemotron-H-56B-Base-8K.json": (56.3, 56.3),
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_those_that_the_publisher_states(real_data: Path, name: str):
    counts = detect(real_data / "configs" / name).plan["parameters"]
    total, active = PUBLISHED[name]
    assert counts["total"] / 1e9 == pytest.approx(total, rel=0.02)
    assert counts["active"] / 1e9 == pytest.approx(active, rel=0.03)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "tags"),
    {
        "gpt_oss--openai_gpt-oss-120b.json": "attn.sliding attn.sink attn.gqa pos.rope.yarn ffn.moe ingest.dequantize",
        "minicpm3--minicpm3_4b.json": "attn.mla pos.rope.longrope",
        "llama4--llama4.json": "attn.chunked ffn.moe.shared_experts weights.compressed_tensors ingest.dequantize",
        "gemma2--mlc_gemma2_9b.json": "attn.softcap head.softcap attn.sliding attn.full",
        "qwen2--qwen2.5_72b.json": "attn.full attn.gqa",
        "falcon--falcon-7b-instruct.json": "attn.mqa pos.rope",
        "gptj--gpt-j-6B_base.json": "pos.rope pos.rope.partial",
        "opt--opt-13b_erebus.json": "pos.learned",
        "smollm3--SmolLM3-3B_shape.json": "pos.rope pos.none",
        "nemotron_h--nvidia_Nemotron-H-56B-Base-8K.json": "attn.ssm pos.none",
        "qwen3--Qwen_Qwen3-32B-FP8.json": "weights.fp8 ingest.dequantize",
    }.items(),
)
def test_capabilities_of_real_configs(real_data: Path, name: str, tags: str):
    assert set(tags.split()) <= set(detect(real_data / "configs" / name).capabilities)


@pytest.mark.real_data
def test_a_window_that_is_switched_off_is_not_a_capability(real_data: Path):
    # Qwen 2.5 carries sliding_window=131072 with use_sliding_window=false.
    for name in ("qwen2--qwen2.5_14b.json", "qwen3--Qwen_Qwen3-32B.json", "qwen2--mlc_qwen2.json"):
        assert "attn.sliding" not in detect(real_data / "configs" / name).capabilities
