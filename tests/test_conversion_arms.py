"""The arms of scripts/bench_conversion.py: settings that the trainers accept, and one arm from the command line."""

import json
import subprocess
import sys

import pytest

from a2d_hf.trainers import BD3LMConfig, MDLMConfig, RepAlignConfig
from scripts import conversion_arms as arms
from tests.conftest import REPOSITORY, tiny_model, tiny_tokenizer


CONFIGS = {arms.MDLM: MDLMConfig, arms.BD3LM: BD3LMConfig, arms.REPALIGN: RepAlignConfig}


@pytest.mark.parametrize("arm", arms.ARMS, ids=lambda arm: arm.name)
def test_the_trainer_accepts_an_arm(arm, tmp_path):
    CONFIGS[arm.objective](output_dir=str(tmp_path), use_cpu=True, **arm.config)
    assert [other.name for other in arms.ARMS].count(arm.name) == 1


def test_an_arm_is_trained_on_the_parents_own_text_and_kept(tmp_path):
    parent, own, data, found = (tmp_path / name for name in ("parent", "own.jsonl", "data.txt", "found.json"))
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(parent)
    tokenizer.save_pretrained(parent)
    data.write_text("one two three four five six seven eight\n" * 60)
    own.write_text("".join(json.dumps({"input_ids": [1, *range(9, 9 + n)]}) + "\n" for n in range(8, 40)))
    name = "BD3LM 4, nested views, Muon, own text, all orders"
    told = (parent, "--data", data, "--own-text", own, "--arms", name, "--json", found, "--tokens", "400")
    told += ("--max-length", "32", "--held-out-tokens", "64", "--points", "2", "--seeds", "0", "--batch-size", "2")
    script = (sys.executable, REPOSITORY / "scripts" / "bench_conversion.py", *told, "--learning-rates", "1e-3")
    done = subprocess.run([str(word) for word in script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads(found.read_text())["runs"][0]
    nelbos = [nelbo for _, nelbo in run["curve"]]
    assert run["arm"] == name and len(nelbos) >= 3 and nelbos[-1] != nelbos[0]
    assert f"| {name} | 0.001 |" in done.stdout
