"""HumanEval, MBPP and HumanEval-infilling: reading the problems, writing the programs, scoring them.

Owns how a problem becomes a prompt and a completion a program, and the file of what has been written, to which each
problem is appended as soon as it is done. Scores are those of `evaluate` with the metrics of local_metrics.py.
"""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .code_execution import Limits
from .errors import BadInput
from .journal import Journal
from .local_metrics import load_metric


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling.modeling_a2d import A2DForMaskedDiffusion


TASKS = ("humaneval", "mbpp", "humaneval-infilling")
FIELDS = {
    "humaneval": ("task_id", "prompt", "test", "entry_point"),
    "humaneval-infilling": ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    "mbpp": ("task_id", "text", "code", "test_list"),
}
# Where a completion of the function at hand is over (Codex, https://huggingface.co/papers/2107.03374, section 2.1).
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@")
MBPP_STOPS = ("[DONE]",)
# The split of https://huggingface.co/papers/2108.07732: 1 to 10 are for prompts, 11 to 510 are the test set.
MBPP_EXAMPLES, MBPP_TEST = (2, 3, 4), range(11, 511)


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        name (`str`): its `task_id`.
        prompt (`str`): what the model continues.
        before (`str`): what stands before the completion in the program.
        after (`str`): what stands behind it: the rest of the function.
        tests (`str`): what checks the program.
        stops (`tuple[str, ...]`): texts that end a completion.
        given (`str`, *optional*): for infilling, the text whose length in tokens the model is told.
    """

    name: str
    prompt: str
    before: str
    after: str
    tests: str
    stops: tuple[str, ...]
    given: str | None = None

    def program(self, completion: str) -> str:
        """The whole program, without its tests."""
        return self.before + completion + self.after


def read_problems(task: str, path: Path) -> list[Problem]:
    """
    The problems of a file, JSONL or JSONL.GZ.

    Raises:
        [`BadInput`]: no such file, not JSONL, empty, or a problem without a field that the task needs.
    """
    rows = _rows(task, path)
    if task != "mbpp":
        return [_humaneval(row, task == "humaneval-infilling") for row in rows]
    by_id = {row["task_id"]: row for row in rows}
    missing = [number for number in MBPP_EXAMPLES if number not in by_id]
    if missing:
        raise BadInput(
            f"--data {path} lacks MBPP problem {missing[0]}, an example of the prompt: give the whole file."
        )
    examples = "".join(
        _mbpp_question(by_id[number]) + by_id[number]["code"] + "\n[DONE]\n\n" for number in MBPP_EXAMPLES
    )
    problems = [_mbpp(row, examples) for row in rows if row["task_id"] in MBPP_TEST]
    if not problems:
        raise BadInput(f"--data {path} holds none of MBPP's test problems, {MBPP_TEST[0]} to {MBPP_TEST[-1]}.")
    return problems


def _rows(task: str, path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise BadInput(f"--data {path} cannot be read: {error}.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"--data {path}, line {number} is not JSON: {error}.") from error
        missing = [name for name in FIELDS[task] if not isinstance(row, dict) or name not in row]
        if missing:
            raise BadInput(f"--data {path}, line {number} has no field {missing[0]!r}: {task} needs it.")
        rows.append(row)
    if not rows:
        raise BadInput(f"--data {path} is empty: it should hold one problem per line.")
    return rows


def _humaneval(row: dict[str, Any], infilling: bool) -> Problem:
    return Problem(
        name=str(row["task_id"]),
        prompt=row["prompt"],
        before=row["prompt"],
        after=row.get("suffix", "") if infilling else "",
        tests=f"{row['test']}\ncheck({row['entry_point']})",
        stops=() if infilling else HUMANEVAL_STOPS,
        given=row["canonical_solution"] if infilling else None,
    )


def _mbpp_question(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these "
        f"tests:\n\n{tests}\n[BEGIN]\n"
    )


def _mbpp(row: dict[str, Any], examples: str) -> Problem:
    tests = "\n".join([row.get("test_setup_code", ""), *row["test_list"]])
    return Problem(str(row["task_id"]), examples + _mbpp_question(row), "", "", tests, MBPP_STOPS)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def write_program(
    model: "A2DForMaskedDiffusion", tokenizer: "PreTrainedTokenizerBase", problem: Problem, options: dict[str, Any]
) -> str:
    """
    One completion of a problem.

    Args:
        options (`dict`): of `diffusion_generate`; `max_new_tokens` bounds a completion, except when infilling.

    Raises:
        [`BadInput`]: the prompt does not fit, or a block-diffusion model does not see the text behind the gap.
    """
    import torch

    from .likelihood import unseen_behind

    ids = tokenizer(problem.prompt).input_ids
    behind: list[int] = []
    room = options["max_new_tokens"]
    if problem.given is not None:
        room = len(tokenizer(problem.given, add_special_tokens=False).input_ids)
        behind = tokenizer(problem.after, add_special_tokens=False).input_ids if problem.after else []
        size = model.config.block_size
        places = range(len(ids), len(ids) + room)
        if behind and model.config.objective == "bd3lm" and unseen_behind(places, places.stop + len(behind), size):
            raise BadInput(f"This block-diffusion model does not see the text behind the gap of {problem.name}.")
    longest = model.config.max_position_embeddings
    if longest is not None and len(ids) + room + len(behind) > longest:
        raise BadInput(
            f"{problem.name} takes {len(ids) + room + len(behind)} tokens with what is to be written, and the model's "
            f"context holds {longest}: lower --max-new-tokens, or take a model with a longer one."
        )
    row = torch.tensor([[*ids, *([model.config.mask_token_id] * room if behind else []), *behind]]).to(model.device)
    written = model.diffusion_generate(
        row,
        attention_mask=torch.ones_like(row),
        tokenizer=tokenizer if problem.stops else None,
        stop_strings=list(problem.stops) or None,
        return_dict_in_generate=False,
        **(options | {"max_new_tokens": 0 if behind else room}),
    )[0]
    completion = tokenizer.decode(written[len(ids) : len(ids) + room], skip_special_tokens=True)
    return cut(completion, problem.stops)


class Generations(Journal):
    """
    `generations.jsonl`: what has been written, one line per problem, appended as soon as it is done.

    Args: as in [`Journal`].
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        super().__init__(path, settings)
        self.done = {record["name"]: record["completions"] for record in self.records}

    def add(self, name: str, completions: list[str]) -> None:
        """Keeps the completions of a problem."""
        super().add({"name": name, "completions": completions})
        self.done[name] = completions


def score(
    problems: Sequence[Problem],
    completions: dict[str, list[str]],
    ks: Sequence[int],
    limits: Limits,
    advance: Callable[[], None] | None = None,
) -> tuple[dict[str, float], dict[str, list[tuple[bool, str]]]]:
    """
    Runs the programs.

    Returns:
        `tuple`: pass@k, and for each problem how each of its programs ended.
    """
    found = load_metric("code_eval").compute(
        predictions=[[problem.program(text) for text in completions[problem.name]] for problem in problems],
        references=[problem.tests for problem in problems],
        k=list(ks),
        allow_code_execution=True,
        limits=limits,
        advance=advance,
    )
    results = found.pop("results")
    return found, {problem.name: each for problem, each in zip(problems, results, strict=True)}


def exact_match(problems: Sequence[Problem], completions: dict[str, list[str]]) -> float:
    """
    Share of completions that are the text that was taken out, white space at the end aside. Runs nothing.

    Args:
        problems (`Sequence[Problem]`): of infilling, with `given`.
        completions (`dict[str, list[str]]`): of each by name.
    """
    pairs = [(text, problem.given) for problem in problems for text in completions[problem.name]]
    found = load_metric("exact_match").compute(
        predictions=[text for text, _ in pairs],
        references=[given for _, given in pairs],
        regexes_to_ignore=[r"\s+\Z"],
    )
    return found["exact_match"]
