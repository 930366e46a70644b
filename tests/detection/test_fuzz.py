"""No config.json whatever gives a traceback or a verdict without a reason."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from a2d_hf.detection import Detection, detect
from a2d_hf.detection.paradigm import REASON_CODES
from a2d_hf.detection.type_table import _table
from a2d_hf.detection.verdict import VERDICTS

from .conftest import SIZES, llama


JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 10**30, -0.0, 0.5, 1e308, float("nan"), float("inf"), "", "auto", "llama",
    "é\u0000", "x" * 300, [], [None], [1, "a", None], [[]], [[["global"], 3]], ["full_attention"], {}, {"a": {}},
    {"rope_type": []}, {"quant_method": {}}, {"model_type": None}, {"AutoModel": 5}, [True], [-5], {"bits": "4"},
]  # fmt: skip
# Every field that a rule looks at, so that mutations hit them and not only each other.
FIELDS = [
    *SIZES, "model_type", "architectures", "auto_map", "text_config", "thinker_config", "layer_types",
    "layers_block_type", "hybrid_override_pattern", "attention_types", "attn_config", "ffn_config",
    "quantization_config", "quantization", "rope_scaling", "rope_parameters", "sliding_window",
    "use_sliding_window", "max_window_layers", "attention_chunk_size", "is_decoder", "is_encoder_decoder",
    "add_cross_attention", "is_causal", "mask_token_id", "block_size", "head_dim", "num_local_experts",
    "n_routed_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers",
    "decoder_sparse_step", "moe_layer_freq", "first_k_dense_replace", "kv_lora_rank", "q_lora_rank",
    "full_attn_idxs", "attn_layer_indices", "attn_layer_period", "full_attention_interval", "linear_attn_config",
    "block_types", "no_rope_layers", "alibi", "multi_query", "new_decoder_architecture", "tie_word_embeddings",
    "dtype", "torch_dtype", "_name_or_path", "final_logit_softcapping", "partial_rotary_factor",
    "sliding_window_pattern", "n_embd", "n_layer", "n_head", "mamba_d_head", "expansion_ratio", "mlp_layer_types",
    "use_bidirectional_attention",
]  # fmt: skip


def mutate(config: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """One to four changes: a field set to junk, dropped, doubled into a sub-object, or swapped with another."""
    config = copy.deepcopy(config)
    for _ in range(dice.randint(1, 4)):
        part = config
        while (inner := [v for v in part.values() if isinstance(v, dict) and v]) and dice.random() < 0.4:
            part = dice.choice(inner)
        name = dice.choice([*part, *FIELDS]) if part and dice.random() < 0.7 else dice.choice(FIELDS)
        action = dice.random()
        if action < 0.6:
            part[name] = copy.deepcopy(dice.choice(JUNK))
        elif action < 0.75:
            part.pop(name, None)
        elif action < 0.9:
            part[name] = copy.deepcopy(dice.choice(list(config.values()) or JUNK))
        else:
            part[name] = [copy.deepcopy(dice.choice(JUNK)) for _ in range(dice.randint(0, 5))]
    return config


def check(found: Detection) -> None:
    """What must hold of every answer."""
    assert found.verdict in VERDICTS
    assert (found.verdict == "unsupported") == bool(found.reasons)
    assert all(reason.code in REASON_CODES and reason.message.strip() for reason in found.reasons)
    assert found.exit_code in ((0,) if found.verdict != "unsupported" else (1, 2))
    assert (found.plan is None) == (found.verdict == "unsupported")
    answer = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    if found.plan is not None:
        counts = answer["plan"]["parameters"]
        assert 0 < counts["active"] <= counts["total"]
        assert all(value > 0 for value in answer["plan"]["memory_gb"].values())


def attempt(folder: Path, text: str) -> Detection:
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        found = detect(folder, gpu="h100")
        check(found)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error} on {text[:2000]}") from error
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_mutations_of_every_type_get_a_reasoned_verdict(tmp_path: Path, seed: int):
    dice = random.Random(seed)
    verdicts = set()
    for model_type, row in _table()["types"].items():
        base: dict[str, Any] = {"model_type": model_type, "architectures": row.get("lm", [None])[:1]}
        if base["architectures"] == [None]:
            base["architectures"] = None
        if dice.random() < 0.7:
            base |= SIZES
        if row.get("path"):
            base[row["path"][0]] = dict(SIZES)
        check(attempt(tmp_path, json.dumps(base)))
        verdicts.add(attempt(tmp_path, json.dumps(mutate(base, dice))).verdict)
        if row["kind"] in ("decoder", "multimodal"):
            for _ in range(2):
                verdicts.add(attempt(tmp_path, json.dumps(mutate(base, dice))).verdict)
    assert verdicts == set(VERDICTS)  # the mutations are not all thrown out at the door


@pytest.mark.real_data
def test_mutations_of_real_configs_get_a_reasoned_verdict(tmp_path: Path, real_data: Path):
    dice = random.Random(0)
    verdicts = set()
    for file in sorted((real_data / "configs").glob("*.json")):
        if file.name == "expected.json":
            continue
        config = json.loads(file.read_text())
        for _ in range(15):
            verdicts.add(attempt(tmp_path, json.dumps(mutate(config, dice))).verdict)
    assert verdicts == set(VERDICTS)


def test_torn_files_get_a_reasoned_verdict(tmp_path: Path):
    dice = random.Random(0)
    text = json.dumps(llama(text_config={"rope_scaling": {"type": "yarn"}}, auto_map={"AutoModel": "x.Y"}))
    for _ in range(400):
        letters = list(text)
        for _ in range(dice.randint(1, 5)):
            at = dice.randrange(len(letters))
            letters[at] = dice.choice(["", '"', "{", "}", "[", ",", "9", "\\", "\x00", "\udcff", "e", "-"])
        attempt(tmp_path, "".join(letters)[: dice.randint(0, len(letters))])


def test_every_single_field_set_to_every_junk_value(tmp_path: Path):
    for name in FIELDS:
        for value in JUNK:
            attempt(tmp_path, json.dumps(llama() | {name: value}))
