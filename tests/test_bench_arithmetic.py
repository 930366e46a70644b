"""The arithmetic benchmark's own logic: its problems, its curves and their summary. No training to speak of."""

import argparse
import itertools
import math

import pytest
import torch
from transformers import AutoTokenizer

from a2d_hf.console import Console
from a2d_hf.modeling.selectors_a2d import Candidates
from scripts.bench_arithmetic import (
    HELD_OUT_SEED,
    character_tokenizer,
    draw_problems,
    leftmost,
    measure,
    measured,
    option_line,
    picture,
    pooled,
    problem,
    summary,
    sweep,
    train_models,
    trained,
)


def by_hand(first: str, second: str) -> str:
    """The sum column by column, from the last."""
    carry, out = 0, ""
    for a, b in zip(reversed(first), reversed(second), strict=True):
        carry, digit = divmod(int(a) + int(b) + carry, 10)
        out += str(digit)
    return out + str(carry)


def test_answers_are_right_and_written_from_the_last_digit():
    pairs = [*draw_problems(500, 6, seed=3), ("000000", "000000"), ("999999", "000001"), ("004700", "995300")]
    for first, second in pairs:
        row = problem(first, second)
        assert row == {"prompt": f"{first[::-1]}+{second[::-1]}=", "completion": by_hand(first, second)}
        assert len(first) == len(second) == 6 and len(row["completion"]) == 7


def test_half_of_the_columns_and_the_accidental_ones_add_up_to_nine():
    columns = [int(a) + int(b) for pair in draw_problems(2000, 8, seed=0) for a, b in zip(*pair, strict=True)]
    share = sum(column == 9 for column in columns) / len(columns)
    assert share == pytest.approx(0.5 + 0.5 * 0.1, abs=5 * math.sqrt(0.25 / len(columns)))


def test_no_held_out_problem_is_trained_on_in_either_order():
    # Numbers of two digits, so few that draws which do not avoid each other must meet.
    held_out = draw_problems(1000, 2, HELD_OUT_SEED)
    blind, train = draw_problems(1500, 2, seed=0), draw_problems(1500, 2, seed=0, avoid=held_out)
    unordered = [{frozenset(pair) for pair in pairs} for pairs in (held_out, blind, train)]
    assert unordered[0] & unordered[1] and not unordered[0] & unordered[2]
    assert [len(pairs) for pairs in unordered] == [1000, 1500, 1500]  # and none twice
    assert draw_problems(1500, 2, seed=0, avoid=held_out) == train != draw_problems(1500, 2, seed=1, avoid=held_out)


def test_a_character_is_a_token():
    tokenizer = character_tokenizer()
    ids = tokenizer("09+12=").input_ids
    assert len(set(ids)) == 6 and tokenizer.decode(ids) == "09+12=" and tokenizer.eos_token_id not in ids


def test_left_to_right_takes_the_first_masks_of_each_row():
    mask_BL = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]]).bool()
    candidates = Candidates(mask_BL, torch.zeros(2, 5).long(), torch.zeros(5, 3), torch.tensor([2, 1]))
    assert leftmost(candidates).tolist() == [[False, True, False, True, False], [True, False, False, False, False]]


def test_every_number_of_forwards_is_swept_once():
    methods = sweep(9)
    steps = [setting["steps"] for setting in methods["confidence"]]
    assert steps == [9, 5, 3, 2, 1]
    assert all([s["steps"] for s in methods[name]] == steps for name in ("margin", "entropy", "random"))
    assert all(s["selector"] is leftmost for s in methods["left to right"])


def test_what_is_counted_of_one_call():
    tokenizer = character_tokenizer()
    ids_BN = torch.tensor(tokenizer(["0123", "4567", "8900"]).input_ids)
    point = measured(lambda: (ids_BN, torch.tensor([4, 2, 1])), ["0123", "4560", "8900"], tokenizer)
    assert (point["problems"], point["right"], point["forwards"]) == (3, 2, 7)
    assert point["tokens_per_forward"] == pytest.approx((1 + 2 + 4) / 3)


def one_point(right: int, problems: int, tokens_per_forward: float, forwards: int) -> dict:
    return {
        "setting": {"steps": 2}, "problems": problems, "right": right, "forwards": forwards,
        "tokens_per_forward": tokens_per_forward, "cpu_seconds": 0.5,
    }  # fmt: skip


def test_models_are_pooled_by_their_problems():
    point = pooled([one_point(80, 100, 2.0, 400), one_point(270, 300, 3.0, 800)], tokens=8)
    assert point["accuracy"] == 87.5 and point["accuracy_of_each_model"] == [80.0, 90.0]
    assert point["standard_error"] == pytest.approx(100 * math.sqrt(0.875 * 0.125 / 400), abs=0.005)
    assert point["tokens_per_forward"] == 2.75 and point["forwards"] == 3.0
    assert point["tokens_per_cpu_second"] == 3200


def curve(*points: tuple[float, float]) -> list[dict]:
    return [{"tokens_per_forward": x, "accuracy": y} for x, y in points]


def test_areas_are_measured_against_the_best_of_all_the_parent_included():
    found = summary(
        {"AR parent": curve((1.0, 99.0)), "a": curve((1.0, 96.0), (3.0, 95.5), (9.0, 60.0)), "b": curve((2.0, 80.0))}
    )
    weights = [math.exp(-3 * (1 - y / 99)) for y in (96.0, 95.5)]
    assert found["a"]["aup"] == pytest.approx(96 + (96 * weights[0] + 95.5 * weights[1]), abs=0.06)
    assert found["AR parent"]["aup"] == 99.0 and found["b"]["aup"] == 160.0
    # Within a point of the best that diffusion has: a method that is never there has no such speed.
    key = "tokens_per_forward_within_one_point"
    assert found["a"][key] == 3.0 and found["b"][key] is None


def test_what_was_trained_with_the_same_settings_is_kept(tmp_path):
    class Trainer:
        trainings = 0

        def train(self):
            Trainer.trainings += 1

        def save_model(self, folder):
            pass

    console = Console(json_output=True)
    for settings, count in (({"steps": 1}, 1), ({"steps": 1}, 1), ({"steps": 2}, 2), ({"steps": 2}, 2)):
        trained(tmp_path / "models" / "m", settings, Trainer, console)
        assert Trainer.trainings == count


def test_the_command_names_every_number_it_was_run_with():
    assert option_line({"digits": 8, "seeds": [0, 1]}) == "--digits 8 --seeds 0 1"


def test_two_steps_of_training_and_every_method_measured(tmp_path):
    args = argparse.Namespace(
        models=tmp_path, digits=3, hidden=16, layers=1, batch=4, learning_rate=1e-3, rows=8, parent_steps=1, steps=1
    )
    rows = [problem(*pair) for pair in draw_problems(8, 3, seed=0)]
    console = Console(json_output=True)
    parent, conversion, seconds = train_models(0, rows, args, console)
    assert seconds > 0 and AutoTokenizer.from_pretrained(conversion).mask_token is not None
    found = measure(parent, conversion, rows, 0, console)
    curves = {name: [pooled([point], 4) for point in points] for name, points in found.items()}
    assert set(curves) == {"AR parent", *sweep(4)}
    forwards = {name: [point["forwards"] for point in points] for name, points in curves.items()}
    assert forwards["AR parent"] == [4.0] and forwards["left to right"] == forwards["random"] == [4.0, 2.0, 1.0]
    # A bound that falls, or rises, never takes more forwards: these are swept from careful to careless.
    for name in ("threshold", "entropy_bound"):
        assert all(a >= b for a, b in itertools.pairwise(forwards[name]))
    assert curves["left to right"][0]["setting"] == {"steps": 4}
    assert "The upper ten points" in picture(curves)
