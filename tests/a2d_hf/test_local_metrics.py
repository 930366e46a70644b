"""The metrics that travel with the package: against counts by hand, without the Hub, and as the harness finds them."""

import json
import re
import sys
from collections import Counter

import pytest

from a2d_hf import local_metrics
from a2d_hf.errors import BadInput
from a2d_hf.local_metrics import NEEDS, load_metric, script
from a2d_hf.task_scores import score, task_names
from tests.conftest import REPOSITORY


PREDICTIONS = ["The cat sat on the mat.\nIt was warm.", "a b c d", "", "Nothing in common"]
REFERENCES = ["the cat lay on a mat\nit was very warm", "d c b a", "empty", "quite other words"]


# ------------------------------------------------------------------------------------------------- against brute force


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def f_measure(shared: int, one: int, other: int) -> float:
    return 2 * shared / (one + other) if shared else 0.0


def shared_grams(one: list[str], other: list[str], n: int) -> float:
    a, b = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (one, other))
    return f_measure(sum((a & b).values()), sum(a.values()), sum(b.values()))


def longest_common(one: list[str], other: list[str]) -> int:
    """By going through every way to leave words out."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + longest_common(one[1:], other[1:])
    return max(longest_common(one[1:], other), longest_common(one, other[1:]))


def test_rouge_is_the_mean_of_counts_by_hand():
    texts = [(words(a), words(b)) for a, b in zip(PREDICTIONS, REFERENCES, strict=True)]
    expected = {
        "rouge1": [shared_grams(a, b, 1) for a, b in texts],
        "rouge2": [shared_grams(a, b, 2) for a, b in texts],
        "rougeL": [f_measure(longest_common(a, b), len(a), len(b)) for a, b in texts],
    }
    found = load_metric("rouge").compute(predictions=PREDICTIONS, references=REFERENCES)
    for name, values in expected.items():
        assert found[name] == pytest.approx(sum(values) / len(values)), name
    assert 0 < found["rouge2"] < found["rougeL"] < found["rouge1"] < 1
    assert found["rougeLsum"] > 0


def test_rouge_is_the_same_at_every_call():
    given = {"predictions": PREDICTIONS, "references": REFERENCES}
    assert load_metric("rouge").compute(**given) == load_metric("rouge").compute(**given)
    assert load_metric("rouge").compute(**given, rouge_types=["rouge1"]).keys() == {"rouge1"}


def test_exact_match_leaves_out_what_it_is_told():
    metric = load_metric("exact_match")
    texts = {"predictions": ["The 42.", "no"], "references": ["the 42", "yes"]}
    assert metric.compute(**texts) == {"exact_match": 0.0}
    assert metric.compute(**texts, ignore_case=True, ignore_punctuation=True) == {"exact_match": 0.5}
    assert metric.compute(**texts, regexes_to_ignore=["T|t", r"\."]) == {"exact_match": 0.5}


# ---------------------------------------------------------------------------------------------------- as a user has it


def test_every_script_is_a_metric_that_evaluate_loads_by_path():
    import evaluate

    assert sorted(file.stem for file in script("rouge").parent.glob("metric_*.py")) == sorted(
        f"metric_{name}" for name in NEEDS
    )
    for name in NEEDS:
        assert isinstance(evaluate.load(str(script(name))), evaluate.Metric)


@pytest.mark.parametrize(("name", "library"), [("rouge", "rouge_score"), ("exact_match", "evaluate")])
def test_what_is_missing_is_said_with_its_extra(monkeypatch, name, library):
    real = local_metrics.importlib.util.find_spec
    monkeypatch.setattr(
        local_metrics.importlib.util, "find_spec", lambda wanted: None if wanted == library else real(wanted)
    )
    local_metrics.load_metric.cache_clear()
    with pytest.raises(BadInput, match=rf'{name} needs the library {library}: run `pip install "a2d_hf\[lm_eval\]"`'):
        load_metric(name)


def test_a_task_file_that_asks_for_rouge_gets_this_one(tmp_path, monkeypatch):
    """Through the harness, with a model that always writes the same; the metrics it had are still there."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_metric

    class Parrot(LM):
        max_gen_toks = 256

        def generate_until(self, requests, **kwargs):
            return ["a cat on a mat"] * len(requests)

        def loglikelihood(self, requests, **kwargs):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    rows = [{"prompt": "p", "response": "a cat"}, {"prompt": "q", "response": "a dog on a mat"}]
    (tmp_path / "dolly_hhrlhf_train_small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("A2D_EVAL_DATA", str(tmp_path))
    folder = REPOSITORY / "recipes" / "lm_eval_tasks"
    assert task_names("local_dolly", folder) == ["local_dolly"]
    assert get_metric("exact_match") is not None and sys.modules["lm_eval.api.metrics"]
    lines = score(Parrot(), "local_dolly", include_path=folder, limit=None, num_fewshot=None, seed=0)
    found = {line["metric"]: line for line in lines}
    assert found["rouge1"]["value"] == pytest.approx((2 * 2 / 7 + 2 * 4 / 10) / 2)
    assert found["rougeL"]["value"] == pytest.approx((2 * 2 / 7 + 2 * 4 / 10) / 2)
    assert found["rouge2"]["value"] == pytest.approx((2 * 1 / 5 + 2 * 2 / 8) / 2)
    assert found["rouge1"]["stderr"] > 0 and found["rouge1"]["examples"] == 2
