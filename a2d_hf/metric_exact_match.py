"""The metric `exact_match` of `evaluate`, from this file alone: the share of predictions equal to their reference.

`evaluate.load(PATH_OF_THIS_FILE)`. Owns what is left out before comparing.
"""

import re
import string

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """`compute(predictions=[...], references=[...])`; patterns are taken out first, then case and punctuation."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="Share of predictions that are their reference, character by character.",
            citation="",
            inputs_description="predictions and references: texts.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, regexes_to_ignore=(), ignore_case=False, ignore_punctuation=False):
        def plain(text: str) -> str:
            for pattern in regexes_to_ignore:
                text = re.sub(pattern, "", text)
            text = text.lower() if ignore_case else text
            return text.translate(str.maketrans("", "", string.punctuation)) if ignore_punctuation else text

        equal = [plain(one) == plain(other) for one, other in zip(predictions, references, strict=True)]
        return {"exact_match": sum(equal) / len(equal)}
