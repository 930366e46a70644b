"""Published tables as sets of runs of the harness: which tasks, with how many examples, decoded how.

Owns the protocols, how one becomes a list of commands, and which of them an interrupted preset still has to do. Each
run has a folder of its own with the harness' files, and a `finished.json` written when it ended well. Runs nothing
itself: lm_eval_cli.py does.
"""

import argparse
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .atomic_files import explained_writes, write_json, write_text
from .errors import BadInput


FINISHED = "finished.json"
OWN_TASKS = "tasks"
# What a preset decides; given beside it, these would be another protocol under its name.
DECIDED = ("--tasks", "--num_fewshot", "--gen_kwargs", "--apply_chat_template", "--include_path", "--use_cache")

# The harness' HellaSwag asks for likelihoods; the published numbers ask for the letter of the ending, in three tokens.
GENERATIVE_HELLASWAG = r"""task: a2d_hellaswag_generative
dataset_path: Rowan/hellaswag
output_type: generate_until
training_split: train
test_split: validation
doc_to_text: "{{activity_label}}: {{ctx}}\n\nWhich ending is the most likely?\nA. {{endings[0]}}\nB. {{endings[1]}}\n\
  C. {{endings[2]}}\nD. {{endings[3]}}\nAnswer with its letter alone.\nAnswer:"
doc_to_target: "{{['A', 'B', 'C', 'D'][label|int]}}"
generation_kwargs:
  until: ["\n"]
  do_sample: false
filter_list:
  - name: letter
    filter:
      - function: regex
        regex_pattern: "\\b([A-D])\\b"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@dataclass(frozen=True)
class PresetRun:
    """
    One call of the harness.

    Attributes:
        name (`str`): of its folder.
        task (`str`): of the harness, or of `task_file`.
        shots (`int`): examples before the question.
        tokens (`int`, *optional*): length to decode, one token per forward; `None` where nothing is.
        model_args (`dict`): beside the user's.
        published (`dict`): the numbers this run is to be held against, in per cent.
        note (`str`): how the run differs from what was published, or why there are two.
        runs_code (`bool`): whether the harness executes what the model writes.
        task_file (`str`, *optional*): a task that the harness does not have.
    """

    name: str
    task: str
    shots: int
    tokens: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    note: str = ""
    runs_code: bool = False
    task_file: str | None = None


@dataclass(frozen=True)
class Preset:
    """
    Attributes:
        source (`str`): where the numbers are from.
        chat_template (`bool`): whether the question is put as a user's turn.
        runs (`tuple[PresetRun, ...]`): in order.
    """

    source: str
    chat_template: bool
    runs: tuple[PresetRun, ...]


def _pair(mdlm: float, bd3lm: float) -> dict[str, float]:
    return {"Qwen3-0.6B-diffusion-mdlm": mdlm, "Qwen3-0.6B-diffusion-bd3lm": bd3lm}


def _small_medium_large(small: float, medium: float, large: float) -> dict[str, float]:
    return {"DiffuGPT-S": small, "DiffuGPT-M": medium, "DiffuLLaMA-7B": large}


# Blocks: the published runs take 256 (the whole completion) for MDLM and 32 for BD3LM, which are what a checkpoint of
# each takes when no `block_size` is given.
TINY_A2D = Preset(
    source="dLLM, Tiny-A2D (https://github.com/ZHZisZZ/dllm), README",
    chat_template=True,
    runs=(
        PresetRun("gsm8k-5shot", "gsm8k_cot", 5, 256, published={"Qwen3-0.6B-diffusion-mdlm": 29.3},
                  note="published with 5 examples for MDLM and none for BD3LM: the two cells are not comparable"),
        PresetRun("gsm8k-0shot", "gsm8k_cot", 0, 256, published={"Qwen3-0.6B-diffusion-bd3lm": 46.3},
                  note="published with 5 examples for MDLM and none for BD3LM: the two cells are not comparable"),
        PresetRun("bbh", "bbh", 3, 256, published=_pair(26.7, 26.6)),
        PresetRun("math", "minerva_math", 0, 256, published=_pair(8.7, 12.9)),
        PresetRun("mmlu", "mmlu_generative", 0, 3, published=_pair(40.0, 39.1),
                  note="published with a variant of this task whose prompt the harness does not have"),
        PresetRun("mmlu-pro", "mmlu_pro", 0, 256, published=_pair(17.3, 13.8)),
        PresetRun("hellaswag", "a2d_hellaswag_generative", 0, 3, published=_pair(42.1, 39.3),
                  task_file=GENERATIVE_HELLASWAG,
                  note="published with a generative task of its own; the wording of the question is ours"),
        PresetRun("humaneval", "humaneval_instruct", 0, 256, published=_pair(30.5, 46.3), runs_code=True),
        PresetRun("mbpp", "mbpp_instruct", 0, 256, published=_pair(29.2, 38.2), runs_code=True,
                  note="an earlier version used 3 examples: BD3LM 32.0"),
    ),
)  # fmt: skip

# The published suffix loss is a mean over 32 times without the weights that make it a bound; ours is the bound, with
# as many masks.
_CHOICE = {"likelihood": "nelbo", "mc_num": 32, "check_greedy": False}
_NOT_IN_TABLE = "not in the published table"
DIFFULLAMA = Preset(
    source="DiffuGPT and DiffuLLaMA (https://huggingface.co/papers/2410.17891), table 1",
    chat_template=False,
    runs=(
        PresetRun("hellaswag", "hellaswag", 0, model_args=_CHOICE, published=_small_medium_large(33.4, 37.2, 58.7)),
        PresetRun("winogrande", "winogrande", 0, model_args=_CHOICE, published=_small_medium_large(50.8, 52.6, 56.4)),
        PresetRun("siqa", "social_iqa", 0, model_args=_CHOICE, published=_small_medium_large(37.0, 39.0, 43.2)),
        PresetRun("piqa", "piqa", 0, model_args=_CHOICE, published=_small_medium_large(57.7, 59.6, 63.3)),
        PresetRun("arc-easy", "arc_easy", 0, model_args=_CHOICE, note=_NOT_IN_TABLE),
        PresetRun("arc-challenge", "arc_challenge", 0, model_args=_CHOICE, note=_NOT_IN_TABLE),
        PresetRun("lambada", "lambada_openai", 0, model_args=_CHOICE | {"check_greedy": True},
                  published=_small_medium_large(45.0, 60.5, 70.9),
                  note="the model is told how long the last word is, as published"),
        PresetRun("triviaqa", "triviaqa", 0, 16, published=_small_medium_large(2.0, 3.8, 18.5),
                  note="published with the length of the answer given; here 16 tokens, ended by the model"),
        PresetRun("gsm8k-0shot", "gsm8k", 0, 256, published=_small_medium_large(50.2, 61.8, 63.1),
                  note="published after finetuning on GSM8K: hold a finetuned model against it"),
        PresetRun("gsm8k-5shot", "gsm8k", 5, 256, note=_NOT_IN_TABLE),
    ),
)  # fmt: skip
PRESETS = {"tiny-a2d": TINY_A2D, "diffullama": DIFFULLAMA}


@dataclass(frozen=True)
class Planned:
    """
    A run with its command.

    Attributes:
        run ([`PresetRun`]): the protocol.
        argv (`list[str]`): for the harness.
        folder (`Path`): where its results go.
        skipped (`str`, *optional*): why it is not done.
    """

    run: PresetRun
    argv: list[str]
    folder: Path
    skipped: str | None = None

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(["a2d-lm-eval", *self.argv])


def plan(name: str, known: argparse.Namespace, rest: list[str]) -> list[Planned]:
    """
    The runs of a preset.

    Args:
        name (`str`): a key of `PRESETS`.
        known (`argparse.Namespace`): with `model_args`, `output_path` and `confirm_run_unsafe_code`.
        rest (`list[str]`): the user's other arguments, passed on to every run.

    Raises:
        [`BadInput`]: no such preset, no model or output folder, or an argument that the preset decides.
    """
    if name not in PRESETS:
        raise BadInput(f"--preset {name} is not a preset: choose from {', '.join(PRESETS)}.")
    decided = [word.split("=")[0] for word in rest if word.split("=")[0] in DECIDED]
    if decided:
        raise BadInput(f"{decided[0]} is decided by --preset {name}: leave one of them out.")
    if not known.output_path:
        raise BadInput(f"--preset {name} needs --output_path FOLDER: each run is kept there as soon as it is done.")
    if not known.model_args:
        raise BadInput(f"--preset {name} needs --model_args pretrained=CHECKPOINT.")
    preset, root = PRESETS[name], Path(known.output_path)
    planned = []
    for run in preset.runs:
        model_args = ",".join([*known.model_args, *(f"{key}={value}" for key, value in run.model_args.items())])
        argv = ["--model", known.model or "a2d", "--model_args", model_args, "--tasks", run.task]
        argv += ["--num_fewshot", str(run.shots), "--output_path", str(root / run.name)]
        argv += ["--use_cache", str(root / run.name / "answers")]
        if run.tokens is not None:
            argv += ["--gen_kwargs", f"max_gen_toks={run.tokens},steps={run.tokens},temperature=0.0"]
        if preset.chat_template:
            argv.append("--apply_chat_template")
        if run.task_file is not None:
            argv += ["--include_path", str(root / OWN_TASKS)]
        skipped = None
        if run.runs_code and known.confirm_run_unsafe_code:
            argv.append("--confirm_run_unsafe_code")
        elif run.runs_code:
            skipped = "it executes what the model writes: add --confirm_run_unsafe_code, or use `a2d eval-code`"
        planned.append(Planned(run, [*argv, *rest], root / run.name, skipped))
    return planned


def finished(planned: Planned, identity: str) -> dict[str, Any] | None:
    """
    What a run that ended well left behind, or `None`.

    Args:
        planned ([`Planned`]): the run.
        identity (`str`): hash of everything that decides an answer.

    Raises:
        [`BadInput`]: the folder holds the results of another model or another command.
    """
    file = planned.folder / FINISHED
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is not JSON: {error}. Remove it to run {planned.run.name} again.") from error
    if (found["command"], found["identity"]) != (planned.command, identity):
        raise BadInput(
            f"{planned.folder} holds the results of another model or of other arguments: give another --output_path, "
            "or remove it."
        )
    return found


def prepare(planned: Planned) -> None:
    """Makes the run's folder, with the task file where the harness has none."""
    with explained_writes(planned.folder):
        planned.folder.mkdir(parents=True, exist_ok=True)
        if planned.run.task_file is not None:
            tasks = planned.folder.parent / OWN_TASKS
            tasks.mkdir(exist_ok=True)
            write_text(tasks / f"{planned.run.task}.yaml", planned.run.task_file)


def finish(planned: Planned, identity: str) -> dict[str, Any]:
    """
    Says that a run ended well, with its results.

    Raises:
        [`BadInput`]: the harness left no results.
    """
    files = sorted(planned.folder.rglob("results_*.json"))
    if not files:
        raise BadInput(f"{planned.run.name} left no results in {planned.folder}.")
    content = json.loads(files[-1].read_text(encoding="utf-8"))
    # A group, such as the 57 subjects of MMLU, is what was published where there is one.
    results = content.get("groups") or content["results"]
    record = {
        "schema_version": 1,
        "run": planned.run.name,
        "command": planned.command,
        "identity": identity,
        "results": {task: _numbers(values) for task, values in results.items()},
        "published": planned.run.published,
        "note": planned.run.note,
        "file": files[-1].relative_to(planned.folder).as_posix(),
    }
    write_json(planned.folder / FINISHED, record)
    return record


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "sample_len"
    }


def summary(records: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows for a table: run, measure, value in per cent or as it is, published."""
    rows = []
    for record in records:
        published = ", ".join(f"{name} {value}" for name, value in record["published"].items()) or "-"
        task, values = next(iter(record["results"].items()))
        for name, value in values.items():
            if "stderr" not in name:
                rows.append([record["run"], f"{task} {name.removesuffix(',none')}", value, published])
                published = ""
    return rows
