"""The metric `code_eval` of `evaluate`, from this file alone: pass@k of programs that are run under limits.

`evaluate.load(PATH_OF_THIS_FILE)`. Owns the features and the average over problems; running is code_execution.py's.
"""

import datasets
import evaluate

from a2d_hf.code_execution import Limits, pass_at_k, run_programs


class CodeEval(evaluate.Metric):
    """`compute(predictions=[[program, ...], ...], references=[tests, ...], k=[1], allow_code_execution=True)`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="Share of problems that at least one of k programs solves.",
            citation="https://huggingface.co/papers/2107.03374",
            inputs_description="predictions: for each problem, its programs; references: the tests of each problem.",
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions, references, k=(1,), allow_code_execution=False, limits=None, workers=None, advance=None
    ):
        if not allow_code_execution:
            raise ValueError("code_eval runs what a model has written: pass `allow_code_execution=True` to allow it.")
        programs = [
            f"{program}\n{tests}" for each, tests in zip(predictions, references, strict=True) for program in each
        ]
        outcomes = iter(run_programs(programs, limits or Limits(), workers, advance))
        results = [[next(outcomes) for _ in each] for each in predictions]
        scores = {
            f"pass@{number}": sum(
                pass_at_k(len(each), sum(one.passed for one in each), number) for each in results
            ) / len(results)
            for number in k
            if all(len(each) >= number for each in results)
        }  # fmt: skip
        return {**scores, "results": [[(one.passed, one.result) for one in each] for each in results]}
