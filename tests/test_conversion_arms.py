"""The arms of scripts/bench_conversion.py: settings that the trainers accept, and one arm from the command line."""

import importlib
import json
import subprocess
import sys

import pytest
from transformers import AutoModel, AutoTokenizer

from a2d_hf.conversion_settings import ConversionSettings
from a2d_hf.data import read_rows
from a2d_hf.evaluate import diffusion_nelbo, usable_rows
from a2d_hf.trainers import BD3LMConfig, MDLMConfig, RepAlignConfig
from a2d_hf.training_run import prepare_data
from scripts import conversion_arms as arms
from tests.conftest import REPOSITORY, tiny_model, tiny_tokenizer


CONFIGS = {arms.MDLM: MDLMConfig, arms.BD3LM: BD3LMConfig, arms.REPALIGN: RepAlignConfig}


def held_out_rows(source: str, data: str) -> list[dict]:
    settings = ConversionSettings(source=source, max_length=32)
    held_out = prepare_data(read_rows(data), AutoTokenizer.from_pretrained(source), settings, None).held_out
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in held_out[:2]]  # 64 tokens of 32 a row


@pytest.mark.parametrize("arm", arms.ARMS, ids=lambda arm: arm.name)
def test_the_trainer_accepts_an_arm(arm, tmp_path):
    for config in [arm.config] + ([arm.last.config] if arm.last is not None else []):
        CONFIGS[arm.objective](output_dir=str(tmp_path), use_cpu=True, **config)
    assert [other.name for other in arms.ARMS].count(arm.name) == 1


@pytest.mark.parametrize(
    ("name", "points", "tokens"),
    [
        ("BD3LM 4, nested views, Muon, own text, all orders", 2, 400),
        ("BD3LM 4, nested views, Muon, own text, all orders, four steps a row, then the data", 8, 1600),
    ],
)
def test_an_arm_is_trained_on_the_parents_own_text_and_kept(name, points, tokens, tmp_path):
    parent, own, data, found = (tmp_path / name for name in ("parent", "own.jsonl", "data.txt", "found.json"))
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(parent)
    tokenizer.save_pretrained(parent)
    data.write_text("one two three four five six seven eight\n" * 60)
    own.write_text("".join(json.dumps({"input_ids": [1, *range(9, 9 + n)]}) + "\n" for n in range(8, 40)))
    told = (parent, "--data", data, "--own-text", own, "--arms", name, "--json", found, "--tokens", str(tokens))
    told += (
        "--max-length",
        "32",
        "--held-out-tokens",
        "64",
        "--points",
        str(points),
        "--seeds",
        "0",
        "--batch-size",
        "2",
    )
    told += ("--models", tmp_path / "models")
    script = (sys.executable, REPOSITORY / "scripts" / "bench_conversion.py", *told, "--learning-rates", "1e-3")
    done = subprocess.run([str(word) for word in script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads(found.read_text())["runs"][0]
    nelbos = [nelbo for _, nelbo in run["curve"]]
    assert run["arm"] == name and len(nelbos) == points + 1 and len(set(nelbos)) == points + 1
    assert [count for count, _ in run["curve"]] == sorted({count for count, _ in run["curve"]})
    assert tokens <= run["curve"][-1][0] < 1.3 * tokens
    assert f"| {name} | 0.001 |" in done.stdout and "min left" in done.stdout
    (kept,) = (tmp_path / "models").iterdir()
    model = AutoModel.from_pretrained(kept)
    assert model.config.block_size == 4
    # The bound on the rows of the parent's NLL, from the kept model.
    rows = usable_rows(held_out_rows(str(parent), str(data)))
    exact = diffusion_nelbo(model, rows, mc_samples=15)
    parents = json.loads(found.read_text())["parent_nll"]
    assert run["exact"]["nats_per_token"] == pytest.approx(exact.nats_per_token, rel=1e-5)
    assert run["exact"]["tokens"] == parents["tokens"] == exact.tokens
    assert f"{name}, over every set of masks: {exact.nats_per_token:.3f}" in done.stdout


def test_a_run_of_two_trainings_is_one_schedule_over_all_its_tokens(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")  # where it finds its neighbour
    runs = importlib.import_module("conversion_runs")
    budget = runs.Budget(tokens=2_000_000, max_length=256, batch_size=1, points=8)
    (arm,) = (arm for arm in arms.ARMS if arm.last is not None)
    first, last = runs.parts_of(arm, budget, 1e-3)
    assert first.own_text and not last.own_text
    assert first.budget.tokens + last.budget.tokens == budget.tokens and first.budget.points + last.budget.points == 8
    ends = first.config["lr_scheduler_kwargs"]["min_lr_rate"]
    for name in ("learning_rate", "muon_learning_rate"):
        assert last.config[name] == pytest.approx(first.config[name] * ends)
    assert last.config["lr_scheduler_type"] == "cosine" and "teacher_targets" not in last.config
