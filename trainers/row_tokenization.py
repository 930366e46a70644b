"""From one row of text, conversation or tokens to token ids and labels.

Owns which tokens of a row are targets by its format: TRL's rules, so that a dataset means the same here and there.
Knows nothing of lengths, or of what diffusion does to the start of a row: dataset_preparation.py does.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import get_training_chat_template


logger = logging.get_logger(__name__)

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class RowRules:
    """
    How rows become token ids and labels.

    Attributes:
        text_field (`str`): column of plain text.
        max_length (`int`, *optional*): most tokens in a row; `None` for no limit.
        truncation_mode (`str`): `keep_start` cuts what is too long; `chunk` cuts plain text into pieces of
            `max_length` that together lose nothing.
        insert_eos (`bool`): whether rows of plain text and plain completions end with EOS, as in TRL.
        token_shift (`bool`): the model's; then rows start with BOS where the tokenizer has one, and position 0 is
            never masked.
        completion_only_loss (`bool`, *optional*): as in TRL; `None` means completions where there are prompts.
        assistant_only_loss (`bool`, *optional*): as in TRL, except that `None` means yes for `messages` rows.
    """

    text_field: str = "text"
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    insert_eos: bool = True
    token_shift: bool = False
    completion_only_loss: bool | None = None
    assistant_only_loss: bool | None = None


@dataclass
class LabelTokens:
    """Rows that are tokens already: TRL's mask columns become labels."""

    completion_only_loss: bool | None

    def __call__(self, row: dict[str, Any], index: int | None = None) -> dict[str, Any]:
        input_ids = list(row["input_ids"])
        if row.get("labels") is not None:
            labels = list(row["labels"])
        else:
            wanted = [1] * len(input_ids)
            if row.get("completion_mask") is not None and self.completion_only_loss is not False:
                wanted = row["completion_mask"]
            if row.get("assistant_masks") is not None:
                wanted = [a and b for a, b in zip(wanted, row["assistant_masks"], strict=True)]
            labels = [token if keep else -100 for token, keep in zip(input_ids, wanted, strict=True)]
        if len(labels) != len(input_ids):
            raise ValueError(
                f"Row {index} has {len(input_ids)} input_ids and {len(labels)} labels: give one for each."
            )
        return {"input_ids": input_ids, "labels": labels}


@dataclass
class TokenizeRow:
    """One row of text or conversation to token ids and labels, by TRL's rules."""

    row_format: str
    tokenizer: PreTrainedTokenizerBase
    text_field: str
    eos: str | None
    completion_only: bool
    assistant_only: bool
    chat_template: str | None
    by_markers: bool
    name: str

    @classmethod
    def of(cls, row_format: str, tokenizer: PreTrainedTokenizerBase, rules: RowRules, name: str) -> "TokenizeRow":
        eos = tokenizer.eos_token if rules.insert_eos else None
        if rules.insert_eos and eos is None and row_format in ("text", "completion"):
            logger.warning(f"The tokenizer has no EOS token, so the rows of the {name} dataset get none.")
        assistant_only = rules.assistant_only_loss
        if assistant_only is None:
            assistant_only = row_format == "messages"
        chat_template, by_markers = None, False
        if row_format in ("messages", "conversational_completion"):
            if tokenizer.chat_template is None:
                raise ValueError(
                    f"The {name} dataset is conversational and the tokenizer has no chat template: set "
                    "`tokenizer.chat_template`, or use rows of plain text."
                )
            if assistant_only:
                chat_template, by_markers = _training_template(tokenizer)
        return cls(
            row_format=row_format,
            tokenizer=tokenizer,
            text_field=rules.text_field,
            eos=eos,
            completion_only=rules.completion_only_loss is not False,
            assistant_only=assistant_only,
            chat_template=chat_template,
            by_markers=by_markers,
            name=name,
        )

    def __call__(self, row: dict[str, Any], index: int | None = None) -> dict[str, Any]:
        where = f"of the {self.name} dataset" if index is None else f"{index} of the {self.name} dataset"
        if self.row_format == "text":
            input_ids = self._plain(self._ended(row[self.text_field], self.text_field, where))
            return {"input_ids": input_ids, "labels": list(input_ids)}
        if self.row_format == "completion":
            prompt = self._checked(row["prompt"], "prompt", where)
            input_ids = self._plain(prompt + self._ended(row["completion"], "completion", where))
            return self._completion(self._plain(prompt), input_ids, [1] * len(input_ids))
        tools = row.get("tools")
        template = {
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }
        if self.row_format == "conversational_completion":
            prompt_ids = self._render(row["prompt"], template, add_generation_prompt=True)
            input_ids, wanted = self._conversation(row["prompt"] + row["completion"], template, where)
            return self._completion(prompt_ids, input_ids, wanted)
        if not row["messages"]:
            raise ValueError(f"Row {where} has no messages.")
        input_ids, wanted = self._conversation(row["messages"], template, where)
        return {
            "input_ids": input_ids,
            "labels": [t if keep else -100 for t, keep in zip(input_ids, wanted, strict=True)],
        }

    def _checked(self, text: Any, column: str, where: str) -> str:
        if not isinstance(text, str):
            raise ValueError(f"Row {where} has no text in column {column!r}.")
        return text

    def _ended(self, text: Any, column: str, where: str) -> str:
        text = self._checked(text, column, where)
        return text if self.eos is None or text.endswith(self.eos) else text + self.eos

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, verbose=False)["input_ids"])

    def _render(self, messages: list[dict[str, Any]], template: dict[str, Any], **kwargs) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template, **kwargs)
        return list(rendered["input_ids"])

    def _completion(self, prompt_ids: list[int], input_ids: list[int], wanted: list[int]) -> dict[str, Any]:
        # The completion starts where the prompt alone and the whole diverge, which need not be where the prompt ends.
        start = common_prefix_length(prompt_ids, input_ids) if self.completion_only else 0
        labels = [
            token if i >= start and keep else -100
            for i, (token, keep) in enumerate(zip(input_ids, wanted, strict=True))
        ]
        return {"input_ids": input_ids, "labels": labels}

    def _conversation(
        self, messages: list[dict[str, Any]], template: dict[str, Any], where: str
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and which of them belong to what is trained."""
        if not self.assistant_only:
            input_ids = self._render(messages, template)
            return input_ids, [1] * len(input_ids)
        if self.by_markers:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **template
            )
            return list(rendered["input_ids"]), list(rendered["assistant_masks"])
        # Without markers, a turn is what its message adds to the rendering of the messages before it.
        input_ids = self._render(messages, template)
        wanted = [0] * len(input_ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opened = self._render(messages[:turn], template, add_generation_prompt=True)
            closed = self._render(messages[: turn + 1], template)
            start, end = common_prefix_length(opened, input_ids), common_prefix_length(closed, input_ids)
            if end < len(closed) or start >= end:
                raise ValueError(
                    f"Row {where}: the chat template renders earlier turns differently once later ones follow, so the "
                    "assistant's turns cannot be told apart: add `{% generation %}` markers to the template, or set "
                    "`assistant_only_loss=False`."
                )
            wanted[start:end] = [1] * (end - start)
        return input_ids, wanted


def _training_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, bool]:
    """The chat template to train with (`None`: the tokenizer's own), and whether it marks the assistant's tokens."""
    own = tokenizer.chat_template["default"] if isinstance(tokenizer.chat_template, dict) else tokenizer.chat_template
    if _GENERATION_MARKER.search(own):
        return None, True
    try:
        return get_training_chat_template(tokenizer), True
    except ValueError:  # a template that TRL has no marked version of
        return None, False


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """How many leading token ids two sequences share."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared
