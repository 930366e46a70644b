"""From a dataset in any of TRL's formats to rows of `input_ids`, `labels` and `row_id`.

Owns the way of a whole dataset: its format, the tokenization of its rows, their start and their length. A label is
-100 where a token is never masked: prompts, BOS and, with token_shift, position 0. Long texts can be cut into pieces
instead of cut off. Whatever is left out is counted. Noise is not drawn here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import is_conversational, is_conversational_from_value, maybe_convert_to_chatml

from .row_tokenization import LabelTokens, RowRules, TokenizeRow


logger = logging.get_logger(__name__)

ANY_DATASET = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class PreparationReport:
    """
    What became of a dataset's rows. Written for people by `str()`, for a manifest by `to_dict()`.

    Attributes:
        name (`str`): which dataset.
        source_rows (`int`): rows given.
        rows (`int`): rows prepared.
        truncated_rows, truncated_tokens (`int`): rows cut at `max_length`, and the tokens that were lost.
        dropped_rows (`int`): rows left out because nothing in them is a target.
        chunked_rows (`int`): rows that were cut into several.
    """

    name: str
    source_rows: int
    rows: int
    truncated_rows: int
    truncated_tokens: int
    dropped_rows: int
    chunked_rows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.name} dataset: {self.source_rows:,} rows given, {self.rows:,} prepared"]
        if self.chunked_rows:
            parts.append(f"{self.chunked_rows:,} cut into pieces with nothing lost")
        if self.truncated_rows:
            parts.append(f"{self.truncated_rows:,} cut at max_length, losing {self.truncated_tokens:,} tokens")
        if self.dropped_rows:
            parts.append(f"{self.dropped_rows:,} dropped because nothing in them is a target")
        return "; ".join(parts) + "."


def prepare_dataset(
    dataset: ANY_DATASET,
    tokenizer: PreTrainedTokenizerBase | None,
    rules: RowRules,
    *,
    name: str = "train",
    num_proc: int | None = None,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    main_process_first: AbstractContextManager | None = None,
) -> tuple[ANY_DATASET, PreparationReport | None]:
    """
    Tokenizes a dataset and decides which tokens may be masked.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows of plain text, of `prompt` and `completion`
            (plain or conversational), of `messages` or `conversations`, or of `input_ids` with `labels`,
            `completion_mask` or `assistant_masks`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): not needed for rows of `input_ids`.
        rules ([`RowRules`]): how.
        name (`str`): what to call the dataset in messages.
        num_proc (`int`, *optional*): processes to use.
        formatting_func (`Callable`, *optional*): turns a row into text.
        main_process_first (context manager, *optional*): lets one process fill the cache for the others.

    Returns:
        The dataset with columns `input_ids`, `labels` and `row_id` (a stream has no `row_id`, and cannot be counted:
        its report is `None`).

    Raises:
        ValueError: unknown format, a row without text, or no row with a target.
    """
    streamed = not isinstance(dataset, datasets.Dataset)
    if not streamed and len(dataset) == 0:
        raise ValueError(f"The {name} dataset is empty: pass at least one row.")
    if not streamed and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset uses `with_transform`, whose result would be frozen here: apply it with `map` first."
        )

    def run_map(dataset: ANY_DATASET, function: Callable, desc: str, **kwargs) -> ANY_DATASET:
        if not streamed:  # streams know neither processes nor progress
            kwargs |= {"num_proc": num_proc, "desc": f"{desc} ({name})"}
        return dataset.map(function, **kwargs)

    with main_process_first or nullcontext():
        # 1. One shape for conversations; text from a formatting function.
        if formatting_func is not None and "input_ids" not in _columns(dataset):
            dataset = run_map(dataset, _FormatRow(formatting_func, rules.text_field), "Formatting")
            dataset = dataset.select_columns([rules.text_field])
        if is_conversational_from_value(_first_row(dataset, name)):
            dataset = run_map(dataset, maybe_convert_to_chatml, "Converting to ChatML", remove_columns="conversations")

        # 2. Token ids and labels.
        columns = _columns(dataset)
        row_format = _row_format(_first_row(dataset, name), columns, rules.text_field, name)
        if row_format == "tokens":
            to_tokens = LabelTokens(completion_only_loss=rules.completion_only_loss)
        else:
            if tokenizer is None:
                raise ValueError(f"The {name} dataset holds text: pass `processing_class`, the model's tokenizer.")
            to_tokens = TokenizeRow.of(row_format, tokenizer, rules, name)
        dataset = run_map(dataset, to_tokens, "Tokenizing", remove_columns=columns, with_indices=not streamed)

        # 3. Start, length, and the labels that the start takes.
        fit = _FitRows.of(row_format, tokenizer, rules)
        fitted = run_map(dataset, fit, "Fitting to max_length", batched=True, remove_columns=_columns(dataset))

        # 4. Nothing to learn, nothing to keep.
        if streamed:
            return fitted.filter(_has_target).select_columns(["input_ids", "labels"]), None
        report, kept = _drop_rows_without_target(fitted, len(dataset), name)
    if report.rows == 0:
        raise ValueError(f"No row of the {name} dataset has a target: {report} Check `max_length` and the labels.")
    if report.truncated_rows or report.dropped_rows:
        logger.warning(str(report))
    else:
        logger.info(str(report))
    return kept, report


def _drop_rows_without_target(
    fitted: datasets.Dataset, source_rows: int, name: str
) -> tuple[PreparationReport, datasets.Dataset]:
    columns = fitted.with_format("numpy")
    lost, pieces, targets = (columns[column][:] for column in ("truncated_tokens", "piece", "targets"))
    kept = fitted.select_columns(["input_ids", "labels"])
    if (targets == 0).any():
        kept = kept.select(targets.nonzero()[0])
    kept = kept.add_column("row_id", list(range(len(kept))))
    report = PreparationReport(
        name=name,
        source_rows=source_rows,
        rows=len(kept),
        truncated_rows=int((lost > 0).sum()),
        truncated_tokens=int(lost.sum()),
        dropped_rows=int((targets == 0).sum()),
        chunked_rows=int((pieces == 1).sum()),
    )
    return report, kept


def _columns(dataset: ANY_DATASET) -> list[str]:
    return list(next(iter(dataset))) if dataset.column_names is None else dataset.column_names


def _first_row(dataset: ANY_DATASET, name: str) -> dict[str, Any]:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} dataset is empty: pass at least one row.")
    return row


def _has_target(row: dict[str, Any]) -> bool:
    return row["targets"] > 0


def _row_format(row: dict[str, Any], columns: list[str], text_field: str, name: str) -> str:
    if "input_ids" in columns:
        return "tokens"
    if "prompt" in columns and "completion" in columns:
        return "conversational_completion" if is_conversational(row) else "completion"
    if "messages" in columns:
        return "messages"
    if text_field in columns:
        return "text"
    raise ValueError(
        f"The {name} dataset has the columns {', '.join(columns)}; it needs {text_field!r} (or `dataset_text_field`), "
        "`prompt` and `completion`, `messages`, or `input_ids`."
    )


class _FormatRow:
    """Applies a user's formatting function. A class, so that worker processes and the cache can pickle it."""

    def __init__(self, function: Callable[[dict[str, Any]], str], text_field: str):
        self.function = function
        self.text_field = text_field

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {self.text_field: self.function(row)}


@dataclass
class _FitRows:
    """Rows of any length to rows of at most `max_length`, with the labels that their start must not have."""

    max_length: int | None
    chunk: bool
    bos_token_id: int | None
    start_with_bos: bool
    hide_start: bool

    @classmethod
    def of(cls, row_format: str, tokenizer: PreTrainedTokenizerBase | None, rules: RowRules) -> "_FitRows":
        bos = None if tokenizer is None else tokenizer.bos_token_id
        return cls(
            max_length=rules.max_length,
            chunk=rules.truncation_mode == "chunk" and row_format in ("text", "tokens"),
            bos_token_id=bos,
            start_with_bos=rules.token_shift and bos is not None,
            hide_start=rules.token_shift,
        )

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        # The last three are counts for the report, and go no further.
        rows: dict[str, list] = {"input_ids": [], "labels": [], "truncated_tokens": [], "piece": [], "targets": []}
        for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            for piece, (piece_ids, piece_labels, lost) in enumerate(self.fit(input_ids, labels)):
                rows["input_ids"].append(piece_ids)
                rows["labels"].append(piece_labels)
                rows["truncated_tokens"].append(lost)
                rows["piece"].append(piece)
                rows["targets"].append(sum(label != -100 for label in piece_labels))
        return rows

    def fit(self, input_ids: list[int], labels: list[int]) -> list[tuple[list[int], list[int], int]]:
        """One row to one or more, each with the number of tokens it lost."""
        if self.start_with_bos and (not input_ids or input_ids[0] != self.bos_token_id):
            input_ids, labels = [self.bos_token_id, *input_ids], [-100, *labels]
        if input_ids and (self.hide_start or input_ids[0] == self.bos_token_id):
            labels = [-100, *labels[1:]]
        length = self.max_length
        if length is None or len(input_ids) <= length:
            return [(input_ids, labels, 0)]
        if not self.chunk:
            return [(input_ids[:length], labels[:length], len(input_ids) - length)]
        # Every token stands in a piece as a target exactly once. Where position 0 cannot be one, a piece opens with
        # BOS, or with the last token of the piece before.
        opening = 1 if self.hide_start else 0
        pieces = [(input_ids[:length], labels[:length], 0)]
        for start in range(length, len(input_ids), length - opening):
            stop = start + length - opening
            head = [] if not opening else [self.bos_token_id] if self.start_with_bos else [input_ids[start - 1]]
            pieces.append((head + input_ids[start:stop], [-100] * opening + labels[start:stop], 0))
        return pieces
