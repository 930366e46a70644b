"""The command `a2d-lm-eval`: lm-evaluation-harness with the model `a2d` in it, and with clear words for bad input.

Owns what has to happen before the harness starts: the model's name is registered beside the built-in ones, task names
are checked, and the cache of answers gets a name of its own for each model and each way to score. Everything else is
the harness' own command line.
"""

import argparse
import difflib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from . import lm_eval_presets as presets
from .atomic_files import explained_writes
from .console import Console
from .errors import A2DError, BadInput, SaveFailed
from .local_metrics import register_rouge


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


MODEL = "a2d"
TARGET = "a2d_hf.lm_eval_model:A2DLM"
# What decides an answer besides the request itself, by the names of the harness.
ANSWERING = ("model", "model_args", "config", "apply_chat_template", "system_instruction")
NAMED_AT_MOST = 3
# What a task file cannot be without, unless it includes another, and the fields that give it.
NEEDED = {
    "dataset_path": {"dataset_path", "custom_dataset"},
    "test_split": {"test_split", "validation_split"},
    "doc_to_text": {"doc_to_text"},
}


def register() -> None:
    """Makes `a2d` a model of the harness and `rouge` a metric; the built-in ones stay."""
    import lm_eval.models  # noqa: F401  registers the built-in models, which the harness does only where none is there
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=TARGET)
    register_rouge()


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the harness.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; `sys.argv[1:]` by default.

    Returns:
        `int`: 0 done, 1 failed, 2 bad input.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    try:
        import lm_eval
    except ImportError:
        console.error('a2d-lm-eval needs lm-evaluation-harness: run `pip install "a2d_hf[lm_eval]"`.')
        return 2
    del lm_eval
    try:
        register()
        preset, argv = _preset(argv)
        if preset.preset is not None:
            return run_preset(preset, argv, console)
        if preset.dry_run:
            raise BadInput("--dry_run lists the runs of a preset: give --preset too.")
        run_harness(argv)
    except A2DError as error:
        console.error(str(error))
        return error.exit_code
    except SystemExit as stop:  # the harness' own end, or what a task file says of its data
        if isinstance(stop.code, str):
            console.error(stop.code)
            return BadInput.exit_code
        return int(stop.code or 0)
    except KeyboardInterrupt:
        console.error("interrupted; with --use_cache PATH a second run goes on from the answers that are there.")
        return 130
    return 0


def run_harness(argv: Sequence[str]) -> None:
    """
    One run of the harness, its tasks checked, its cache named, and its results seen to be there.

    Raises:
        [`SaveFailed`]: no space for the cache or the results.
        [`BadInput`]: a row without a field that its task reads.
    """
    known = _known(argv)
    check_tasks(known)
    sys.argv = ["a2d-lm-eval", *with_own_cache(argv, known)]
    from lm_eval.__main__ import cli_evaluate

    before = _results(known.output_path)
    with explained_writes(Path(known.output_path or known.use_cache or "the results")), explained_rows():
        cli_evaluate()
    # The harness says in its log that it could not save, and ends as if it had.
    if known.output_path is not None and known.tasks and int(os.environ.get("RANK", "0")) == 0:
        check_saved(Path(known.output_path), _results(known.output_path) - before)


def _results(output_path: str | None) -> set[Path]:
    """The files of results that are there."""
    if output_path is None:
        return set()
    place = Path(output_path)
    # The harness takes a name that ends in .json for the beginning of a file's name.
    return set(place.parent.glob(f"{place.stem}_*.json") if place.suffix == ".json" else place.rglob("results_*.json"))


def check_saved(place: Path, found: set[Path]) -> None:
    """Raises [`SaveFailed`] where a run left no results, or half of them, which are then removed."""
    whole = False
    for file in found:
        try:
            json.loads(file.read_text(encoding="utf-8"))
            whole = True
        except ValueError:
            file.unlink()
    if not whole:
        raise SaveFailed(
            f"The results could not be written to {place}: free some space on that disk, or give another "
            "--output_path, and run the command again (with --use_cache PATH, nothing is asked twice)."
        )


@contextmanager
def explained_rows() -> Iterator[None]:
    """Turns what the harness raises for a row without a field into [`BadInput`]."""
    from jinja2 import UndefinedError

    try:
        yield
    except UndefinedError as error:
        raise BadInput(f"--tasks: a row of the data has no field that its task file reads: {error}.") from error


def run_preset(preset: argparse.Namespace, rest: list[str], console: Console) -> int:
    """
    The runs of a preset, one after another; those that have been finished before are left alone.

    Returns:
        `int`: 0, or 1 where a run failed; the others are done all the same.
    """
    planned = presets.plan(preset.preset, preset, rest)
    source = presets.PRESETS[preset.preset].source
    if preset.dry_run:
        for one in planned:
            console.step(one.run.name + (f" (skipped: {one.skipped})" if one.skipped else ""))
            console.note(one.command)
            for name, value in one.run.published.items():
                console.note(f"published: {name} {value}")
            if one.run.note:
                console.note(f"note: {one.run.note}")
        console.note(f"source of the published numbers: {source}")
        return 0
    identities = [answers_digest(_known(one.argv)) for one in planned]
    # Looked up before anything runs: processes that share the work then agree on what is to do.
    records = [presets.finished(one, identity) for one, identity in zip(planned, identities, strict=True)]
    main_process = int(os.environ.get("RANK", "0")) == 0
    failed = []
    for number, (one, identity) in enumerate(zip(planned, identities, strict=True)):
        if records[number] is not None or one.skipped:
            console.step(f"{one.run.name}: " + (f"skipped, {one.skipped}" if one.skipped else "finished before"))
            continue
        console.step(f"{one.run.name}: {one.command}")
        try:
            presets.prepare(one)
            if one.run.task_file is not None:
                task_manager.cache_clear()  # it has not seen the file that was just written
            run_harness(one.argv)
            if main_process:
                records[number] = presets.finish(one, identity)
        except SaveFailed:
            raise
        except (Exception, SystemExit) as error:  # one task's data that cannot be had must not cost the others
            failed.append(one.run.name)
            console.error(f"{one.run.name}: {' '.join(str(error).split()) or type(error).__name__}")
    if main_process:
        console.line()
        console.table(["run", "measure", "here", "published, %"], presets.summary([one for one in records if one]))
        console.note(f"source of the published numbers: {source}")
        if failed:
            console.warn(f"not finished: {', '.join(failed)}. The same command runs these alone again.")
    return 1 if failed else 0


def _preset(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a preset, and what is left for the harness."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--dry_run", "--dry-run", action="store_true")
    own, rest = parser.parse_known_args(list(argv))
    if own.preset is None:
        return own, rest
    parser.add_argument("--model", "-M")
    parser.add_argument("--model_args", "-a", nargs="+")
    parser.add_argument("--output_path", "-o")
    parser.add_argument("--confirm_run_unsafe_code", action="store_true")
    return parser.parse_known_args(list(argv))


def _known(argv: Sequence[str]) -> argparse.Namespace:
    """What this module needs to know of the harness' arguments; the harness checks them all."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", "-t", nargs="+")
    parser.add_argument("--include_path")
    parser.add_argument("--use_cache", "-c")
    parser.add_argument("--output_path", "-o")
    parser.add_argument("--model", "-M")
    parser.add_argument("--model_args", "-a", nargs="+")
    parser.add_argument("--config", "-C")
    parser.add_argument("--apply_chat_template", nargs="?", const=True)
    parser.add_argument("--system_instruction")
    return parser.parse_known_args(list(argv))[0]


def check_tasks(known: argparse.Namespace) -> None:
    """Raises [`BadInput`] for a task that the harness does not have, with the nearest names that it has."""
    if known.include_path is not None and not Path(known.include_path).is_dir():
        raise BadInput(f"--include_path {known.include_path} is not a folder.")
    asked = [name for word in known.tasks or [] for name in word.split(",") if name]
    if not asked:
        return
    manager = task_manager(known.include_path)
    for name in asked:
        if name.endswith((".yaml", ".yml")):
            if "*" not in name:
                check_task_file(Path(name))
            continue
        if manager.match_tasks([name]):
            continue
        near = difflib.get_close_matches(name, manager.all_tasks, n=NAMED_AT_MOST, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else "`a2d-lm-eval ls tasks` lists them"
        raise BadInput(f"--tasks {name} is not a task: {hint}.")


@cache
def task_manager(include_path: str | None) -> "TaskManager":
    """The harness' own. It reads thousands of task files, which takes seconds: once is enough."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def check_task_file(path: Path) -> None:
    """Raises [`BadInput`] for a task file that is absent, empty, or says nothing of a task."""
    import yaml

    if not path.is_file():
        raise BadInput(f"--tasks {path} does not exist.")
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("!", lambda *parts: None)  # `!function` names code, which is not looked up here
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"--tasks {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not content:
        raise BadInput(f"--tasks {path} is empty: it should describe a task.")
    if not isinstance(content, dict) or not {"task", "group"} & set(content):
        raise BadInput(f"--tasks {path} names no task: it needs the field `task`.")
    if isinstance(content.get("task"), str) and "include" not in content:
        for name, ways in NEEDED.items():
            if not ways & set(content):
                raise BadInput(f"--tasks {path} has no field `{name}`: the task needs it.")


def with_own_cache(argv: Sequence[str], known: argparse.Namespace) -> list[str]:
    """
    The arguments, the name of `--use_cache` followed by a hash of everything that decides an answer.

    The harness looks answers up by the request alone: with one file for two models, the second would get the answers
    of the first.
    """
    argv = list(argv)
    if known.use_cache is None:
        return argv
    digest = answers_digest(known)
    for index, word in enumerate(argv):
        for flag in ("--use_cache", "-c"):
            if word == flag and index + 1 < len(argv):
                argv[index + 1] = f"{known.use_cache}-{digest}"
            elif word.startswith(f"{flag}="):
                argv[index] = f"{flag}={known.use_cache}-{digest}"
    return argv


def answers_digest(known: argparse.Namespace) -> str:
    """Hash of everything that decides an answer besides the request: the model, its files, its arguments."""
    answering = [f"{name}={vars(known)[name]!r}" for name in ANSWERING]
    answering += [f"{path}: {fingerprint(path)}" for path in _named_paths(known)]
    return hashlib.sha256("\n".join(answering).encode()).hexdigest()[:16]


def _named_paths(known: argparse.Namespace) -> list[str]:
    """Files and folders that the model's arguments, or the configuration file, name."""
    words = [word for text in known.model_args or [] for word in text.split(",")]
    values = [word.split("=", 1)[1] for word in words if "=" in word]
    return [value for value in [*values, known.config] if value and os.path.exists(value)]


def fingerprint(path: str) -> str:
    """Hash of a file, or of the names, sizes and times of the files of a folder."""
    place = Path(path)
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    files = sorted(file for file in place.iterdir() if file.is_file())
    facts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
