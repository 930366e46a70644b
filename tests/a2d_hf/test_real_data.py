"""Real checkpoints and corpora through the real pipeline."""

import itertools
import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from a2d_hf.conversion import convert
from a2d_hf.data import cut_text, read_rows


pytestmark = pytest.mark.real_data


def test_a_real_corpus_is_cut_without_loss(real_data):
    tokenizer = AutoTokenizer.from_pretrained(real_data / "models" / "stories260K")
    text = read_rows(real_data / "corpora" / "tinystories_train.txt").rows[0]["text"][:100_000]
    rows = cut_text(text, tokenizer, 512)
    assert "".join(rows) == text
    lengths = [len(tokenizer(row).input_ids) for row in rows]
    assert max(lengths) <= 512 and sum(lengths[:-1]) / len(lengths[:-1]) > 400


@pytest.mark.parametrize("name", ["dolly_hhrlhf_train_small.jsonl", "gsm8k_train.jsonl",
                                  "llms-from-scratch_instruction-data.json"])  # fmt: skip
def test_real_instruction_sets_are_read(real_data, name):
    rows = read_rows(real_data / "instruct" / name)
    assert rows.columns == ("prompt", "completion") and len(rows.rows) > 100


def test_a_real_model_converts_exactly_and_its_parent_reads_its_own_language(real_data, tmp_path):
    (tmp_path / "stories.txt").write_text(
        (real_data / "corpora" / "tinystories_train.txt").read_text(encoding="utf-8")[:60_000], encoding="utf-8"
    )
    run = convert(
        real_data / "models" / "stories260K",
        tmp_path / "run",
        data=tmp_path / "stories.txt",
        max_steps=1,
        held_out=0.3,
    )
    gates, results = run.manifest["gates"], run.manifest["results"]
    assert gates["identity"]["detail"]["max_abs_diff"] == 0.0
    assert run.manifest["mask_token"]["strategy"] == "grow"
    # A trained parent is far below the 6.2 nats of a uniform guess among 512 tokens; its conversion is not yet.
    assert 1.0 < results["parent_nll"]["nats_per_token"] < 3.0
    assert 6.0 < results["nelbo_before"]["nats_per_token"] < 9.0


@pytest.mark.slow
def test_the_sorter_sorts_in_one_forward_pass(real_data, tmp_path):
    prompts = ["".join(letters) for letters in itertools.product("ABC", repeat=6)]
    rows = [{"prompt": prompt, "completion": "".join(sorted(prompt))[:5]} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = convert(
        real_data / "models" / "gpt-nano-sort", tmp_path / "run", data=tmp_path / "rows.jsonl", held_out=0.0,
        batch_size=81, epochs=80, learning_rate=3e-3, device="cpu",
    )  # fmt: skip
    model, tokenizer = AutoModel.from_pretrained(run.model_path), AutoTokenizer.from_pretrained(run.model_path)
    ids = torch.tensor([tokenizer(prompt).input_ids for prompt in prompts])
    for steps in (5, 1):
        output = model.diffusion_generate(ids, max_new_tokens=5, steps=steps, return_dict_in_generate=True)
        assert output.num_forwards == steps
        found = [text.replace(" ", "") for text in tokenizer.batch_decode(output.sequences[:, 6:])]
        assert sum(text == row["completion"] for text, row in zip(found, rows, strict=True)) >= 726
