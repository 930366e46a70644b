"""Tasks of lm-evaluation-harness on a converted model and on its AR parent, with one protocol.

Owns the calls of the harness and what of its answer a report keeps: the numbers, without times and paths, so that the
same seed gives the same bytes. Both models see the same examples, prompts and few-shot drawings; the parent answers
through the harness' own `HFLM`, the conversion through lm_eval_model.py's subclass of it.
"""

import argparse
import logging
import math
from pathlib import Path
from typing import Any

from .errors import BadInput
from .lm_eval_cli import check_tasks, explained_rows, register, task_manager


NUMBERS = ("sample_len", "alias", "name", "sample_count")  # what stands among the metrics and is none


def task_names(tasks: str, include_path: Path | None) -> list[str]:
    """
    The tasks of `--tasks`, checked before anything is measured.

    Raises:
        [`BadInput`]: the harness is not installed, has no such task (with the nearest names), or cannot read the data
            of one of `include_path`.
    """
    try:
        register()
    except ImportError as error:
        raise BadInput('--tasks needs lm-evaluation-harness: run `pip install "a2d_hf[lm_eval]"`.') from error
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise BadInput("--tasks names no task: give for example --tasks lambada_openai,piqa.")
    if include_path is not None and not include_path.is_dir():
        raise BadInput(f"--include-path {include_path} is not a folder.")
    check_tasks(argparse.Namespace(tasks=names, include_path=None if include_path is None else str(include_path)))
    if any("*" in name for name in names):
        names = list(dict.fromkeys(one for name in names for one in _matching(name, include_path)))
    if include_path is not None:  # a user's own task: better found out now than behind an hour of measuring
        _load(names, include_path)
    return names


def _matching(name: str, include_path: Path | None) -> list[str]:
    return _manager(include_path).match_tasks([name]) if "*" in name else [name]


def _load(names: list[str], include_path: Path) -> None:
    from lm_eval.tasks import get_task_dict

    _quiet()
    for name in names:
        try:
            get_task_dict([name], _manager(include_path))
        except (Exception, SystemExit) as error:  # whatever the task's own code raises
            raise BadInput(f"--tasks {name} cannot be loaded: {' '.join(str(error).split())}") from error


def _manager(include_path: Path | None) -> Any:
    return task_manager(None if include_path is None else str(include_path))


def diffusion_answers(
    model: Any, tokenizer: Any, *, likelihood: str, mc_num: int, seed: int, batch_size: int, **decoding: Any
) -> Any:
    """The converted model as the harness sees it; `decoding` are arguments of `diffusion_generate`."""
    from .lm_eval_model import A2DLM

    _quiet()
    return A2DLM(
        model, tokenizer=tokenizer, likelihood=likelihood, mc_num=mc_num, mc_seed=seed, batch_size=batch_size,
        device=str(model.device), **decoding,
    )  # fmt: skip


def parent_answers(parent: Any, tokenizer: Any, *, batch_size: int) -> Any:
    """The autoregressive parent as the harness sees it."""
    from lm_eval.models.huggingface import HFLM

    _quiet()
    return HFLM(parent, tokenizer=tokenizer, backend="causal", batch_size=batch_size, device=str(parent.device))


def _quiet() -> None:
    """The harness tells programmers what it is about to do; a user of `a2d eval` has asked for it."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def score(
    answers: Any, task: str, *, include_path: Path | None, limit: int | None, num_fewshot: int | None, seed: int
) -> list[dict[str, Any]]:
    """
    One task, or every task of a group.

    Returns:
        `list[dict]`: `task`, `metric`, `value` and `stderr` (`None` where the harness has none, or an infinite one),
        `num_fewshot`, `examples`, `version`, `new_tokens` (most tokens of an answer, `None` where answers are given
        and scored by their likelihood); one entry per metric.
    """
    from lm_eval import simple_evaluate

    with explained_rows():
        found = simple_evaluate(
            model=answers,
            tasks=[task],
            task_manager=_manager(include_path),
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    rows = []
    for name, results in found["results"].items():
        config, new_tokens = found.get("configs", {}).get(name, {}), None
        if config.get("output_type") == "generate_until":
            new_tokens = (config.get("generation_kwargs") or {}).get("max_gen_toks", answers.max_gen_toks)
        for key, value in results.items():
            if key in NUMBERS or "_stderr," in key or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            metric, _, filtered = key.partition(",")
            error = results.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": name,
                    "metric": metric if filtered in ("", "none") else f"{metric} ({filtered})",
                    "value": float(value) if math.isfinite(value) else None,
                    "stderr": float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                    "num_fewshot": found.get("n-shot", {}).get(name),
                    "examples": found.get("n-samples", {}).get(name, {}).get("effective"),
                    "version": found.get("versions", {}).get(name),
                    "new_tokens": new_tokens,
                }
            )
    return rows
