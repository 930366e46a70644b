"""The metric `rouge` of `evaluate`, from this file alone: how many words and word pairs two texts share.

`evaluate.load(PATH_OF_THIS_FILE)`. Owns the mean over texts; the counting is the library rouge_score's.
"""

import datasets
import evaluate
from rouge_score import rouge_scorer


TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """
    `compute(predictions=[...], references=[...])`: the mean F-measure of each type. The metric of that name on the Hub
    gives the middle of a bootstrap instead, which changes with numpy's random state.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="F-measure of shared words (1), word pairs (2) and of the longest common subsequence (L).",
            citation="https://aclanthology.org/W04-1013",
            inputs_description="predictions and references: texts.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, rouge_types=TYPES, use_stemmer=False):
        scorer = rouge_scorer.RougeScorer(list(rouge_types), use_stemmer=use_stemmer)
        found = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
        return {name: sum(float(each[name].fmeasure) for each in found) / len(found) for name in rouge_types}
