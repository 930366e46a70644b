"""Gaps, what is written into them, and how it is counted, against loops written out here."""

import math
import statistics

import pytest
import torch

from a2d_hf.infilling_accuracy import Gap, continue_before_gaps, cut_gaps, fill_gaps, score_fills
from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.throughput import judge, setting_name, settings, sweep
from tests.conftest import tiny_model, tiny_tokenizer


EOS = 2


@pytest.fixture
def model():
    return A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tiny_tokenizer(), objective="mdlm").eval()


def text_rows(count, length=20, prompt=0):
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        ids = torch.randint(4, 100, (length + i,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def test_a_gap_holds_scored_tokens_and_no_end_and_has_both_sides():
    rows = text_rows(40, prompt=4)
    for row in rows:
        row["input_ids"][9] = EOS
    gaps = cut_gaps(rows, 3, 40, seed=0, never=[EOS])
    assert len(gaps) == 40
    for gap in gaps:
        row = rows[gap.row]["input_ids"]
        assert gap.start >= 4 and gap.start + 3 < len(row) and EOS not in row[gap.start : gap.start + 3]
    assert len({gap.start for gap in gaps}) > 5
    # Keyed by the row alone: fewer gaps, or shorter rows elsewhere, move none.
    assert cut_gaps(rows, 3, 5, seed=0, never=[EOS]) == gaps[:5]
    assert cut_gaps(rows, 3, 40, seed=1, never=[EOS]) != gaps
    assert cut_gaps(rows, 30, 40, seed=0) == [gap for gap in cut_gaps(rows, 30, 40, seed=0) if gap.row > 10]


def test_a_block_diffusion_model_gets_gaps_whose_right_side_it_sees():
    for gap in cut_gaps(text_rows(40), 3, 40, seed=0, block_size=8):
        assert gap.start // 8 == (gap.start + 3) // 8
    assert cut_gaps(text_rows(40), 8, 40, seed=0, block_size=8) == []


def test_shares_and_standard_errors_against_statistics():
    rows = text_rows(4)
    gaps = [Gap(i, 5, 2) for i in range(4)]
    truth = [rows[i]["input_ids"][5:7] for i in range(4)]
    fills = [truth[0], [truth[1][0], 0], [0, 0], truth[3]]
    found = score_fills(gaps, rows, fills)
    shares, exact = [1.0, 0.5, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    assert found["token_accuracy"] == statistics.mean(shares) and found["span_accuracy"] == statistics.mean(exact)
    assert found["token_accuracy_stderr"] == pytest.approx(statistics.stdev(shares) / math.sqrt(4))
    assert found["span_accuracy_stderr"] == pytest.approx(statistics.stdev(exact) / math.sqrt(4))
    assert score_fills(gaps[:1], rows, fills[:1])["token_accuracy_stderr"] is None


@torch.no_grad()
def test_one_step_writes_the_likeliest_tokens_given_both_sides(model):
    rows = text_rows(3)
    gaps = cut_gaps(rows, 4, 3, seed=0)
    fills, parallel = fill_gaps(model, rows, gaps, steps=1, batch_size=2)
    assert parallel == 4.0
    for gap, fill in zip(gaps, fills, strict=True):
        ids = torch.tensor([rows[gap.row]["input_ids"]])
        ids[0, gap.places] = model.config.mask_token_id
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, gap.places]
        logits[:, [EOS, model.config.mask_token_id]] = float("-inf")
        assert fill == logits.argmax(-1).tolist()


def test_the_batch_does_not_matter_and_one_step_per_token_is_the_default(model):
    rows = text_rows(5)
    gaps = cut_gaps(rows, 4, 5, seed=0)
    together, parallel = fill_gaps(model, rows, gaps, batch_size=5)
    assert parallel == 1.0
    assert together == [fill_gaps(model, rows, [gap])[0][0] for gap in gaps]


@torch.no_grad()
def test_the_parent_continues_greedily_from_the_left():
    parent, rows = tiny_model("llama"), text_rows(3)
    gaps = cut_gaps(rows, 3, 3, seed=0)
    found = continue_before_gaps(parent, rows, gaps, never=[EOS], batch_size=3)
    for gap, fill in zip(gaps, found, strict=True):
        ids = rows[gap.row]["input_ids"][: gap.start]
        for token in fill:
            logits = parent(torch.tensor([ids])).logits[0, -1]
            logits[EOS] = float("-inf")
            assert token == int(logits.argmax())
            ids = [*ids, token]


@torch.no_grad()
def test_judging_is_the_mean_nll_of_the_new_tokens():
    parent = tiny_model("llama")
    texts = [row["input_ids"][:12] for row in text_rows(2)]
    nats = []
    for ids in texts:
        logs = parent(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats += [-float(logs[i - 1, ids[i]]) for i in range(5, 12)]
    found = judge(parent, texts, 5)
    assert found["parent_nll"] == pytest.approx(statistics.mean(nats), rel=1e-5)
    assert found["distinct"] == pytest.approx(statistics.mean(len(set(ids[5:])) / 7 for ids in texts))


def test_a_sweep_does_what_its_settings_say(model):
    prompts = torch.tensor([row["input_ids"][:6] for row in text_rows(3)])
    points, times = sweep(model, prompts, 8)
    assert [setting_name(s) for s in settings(8)][:5] == ["8 steps", "4 steps", "2 steps", "1 step", "threshold 0.9"]
    for point in points:
        assert all(len(ids) == 14 and model.config.mask_token_id not in ids for ids in point["sequences"])
        if "steps" in point["setting"]:
            assert point["num_forwards"] == point["setting"]["steps"]
            assert point["tokens_per_forward"] == pytest.approx(8 / point["setting"]["steps"])
    assert all(each["tokens_per_second"] == pytest.approx(24 / each["seconds"]) for each in times)
