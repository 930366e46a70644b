"""The metrics that travel with this package: scripts beside this file that `evaluate` loads by their path, without the
Hub.

Owns their names, what each needs to be installed, and how lm-evaluation-harness comes to know the one that it has not.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BadInput


if TYPE_CHECKING:
    import evaluate


# Name of the metric, which is that of `evaluate`, and the libraries that its script imports.
NEEDS = {"code_eval": ("evaluate",), "exact_match": ("evaluate",), "rouge": ("evaluate", "rouge_score")}


def script(name: str) -> Path:
    """The file that `evaluate.load` takes."""
    return Path(__file__).with_name(f"metric_{name}.py")


def check_installed(name: str) -> None:
    """Raises [`BadInput`] where a library is missing that the metric needs."""
    for library in NEEDS[name]:
        if importlib.util.find_spec(library) is None:
            raise BadInput(f'The metric {name} needs the library {library}: run `pip install "a2d_hf[lm_eval]"`.')


@cache
def load_metric(name: str) -> "evaluate.Metric":
    """
    A metric, ready for `compute`.

    Args:
        name (`str`): a key of `NEEDS`.

    Raises:
        [`BadInput`]: a library that it needs is not installed.
    """
    check_installed(name)
    import evaluate

    return evaluate.load(str(script(name)), keep_in_memory=True)


def register_rouge() -> None:
    """
    Makes `metric: rouge` of a task file this package's own. The harness has no metric of that name, and would fetch
    the one on the Hub.
    """
    import lm_eval.api.metrics  # noqa: F401  registers the built-in ones, which the harness does only where none is
    from lm_eval.api.registry import metric_registry, register_metric

    if "rouge" not in metric_registry:
        register_metric(metric="rouge", higher_is_better=True, aggregation="mean")(_rouge)


def _rouge(predictions: list[str], references: list[str], **options) -> dict[str, float]:
    """Of one answer, as the harness asks; it takes the mean itself."""
    return load_metric("rouge").compute(predictions=predictions, references=references, **options)
