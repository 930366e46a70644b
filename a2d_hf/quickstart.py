"""`a2d quickstart`: the whole pipeline on a model small enough to train while you watch, offline.

Owns the order of its stages and what it leaves in its folder; every stage is done by the code that does it for real
models. Interrupted, it continues where it was: stages that are complete are not done again.

    python_reference.txt    the text
    parent/                 the autoregressive model, an ordinary checkpoint
    run/                    the conversion's run directory
    quickstart.json         what has been done, with which choices
    report.html             the page that shows it; written last
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .atomic_files import explained_writes, write_json
from .console import Console, duration
from .conversion import convert, resume
from .errors import BadInput
from .run_directory import RunDirectory


DEFAULT_MINUTES = 5.0
DEFAULT_FOLDER = Path("runs/quickstart")
# At DEFAULT_MINUTES on two CPU cores; `minutes` scales both.
PARENT_STEPS, DIFFUSION_STEPS = 500, 1000
BATCH_SIZE = 16
DIFFUSION_RATE = 3e-3


@dataclass(frozen=True)
class QuickstartPlan:
    """The choices of one quickstart; a continued one must find the same."""

    seed: int
    parent_steps: int
    diffusion_steps: int

    @classmethod
    def of(cls, minutes: float, seed: int) -> "QuickstartPlan":
        """Steps in proportion to `minutes`."""
        if not 0 < minutes <= 24 * 60:
            raise BadInput(f"--minutes must lie between 0 and 1440, not {minutes:g}.")
        share = minutes / DEFAULT_MINUTES
        return cls(seed, max(1, round(PARENT_STEPS * share)), max(1, round(DIFFUSION_STEPS * share)))


def run_quickstart(
    out: str | Path | None = None,
    *,
    minutes: float = DEFAULT_MINUTES,
    seed: int = 0,
    console: Console | None = None,
) -> int:
    """
    Trains a small parent, converts it, proves and trains the conversion, measures, samples and reports.

    Args:
        out (`str` or `Path`, *optional*): the folder to make, or one to continue; by default `runs/quickstart`, with
            the next free number where that one is complete.
        minutes (`float`, *optional*, defaults to 5): about how long it may take on two CPU cores; decides the numbers
            of training steps, so that the same value gives the same models on any machine.
        seed (`int`, *optional*, defaults to 0): decides everything that is random.
        console ([`~console.Console`], *optional*): where progress is shown.

    Returns:
        `int`: 0.

    Raises:
        [`BadInput`]: `out` holds something else.
    """
    console = console or Console()
    plan = QuickstartPlan.of(minutes, seed)
    folder = Path(out).expanduser() if out is not None else next_folder()
    journal = _Journal.at(folder, plan)
    if journal.facts:
        console.line(f"Continuing {folder}")
    try:
        _stages(folder, plan, journal, console)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; the same command continues {folder}.") from stop
    return 0


def _stages(folder: Path, plan: QuickstartPlan, journal: "_Journal", console: Console) -> None:
    parent_path, run_path = folder / "parent", folder / "run"
    console.step("1/5  A text, and an autoregressive model of it")
    text = _make_text(folder, console)
    _make_parent(parent_path, text, plan, journal, console)

    console.step("\n2/5  Detect: can it be converted?")
    _show_detection(parent_path, console)

    console.step("\n3/5  Convert, prove that nothing else changed, and train")
    with journal.timed("conversion"):
        run = _convert(parent_path, run_path, text, plan, console)

    console.step("\n4/5  Write text by filling in blanks, in any order")
    with journal.timed("sampling"):
        from .quickstart_samples import make_samples

        samples = make_samples(parent_path, run.model_path, plan.seed, console)

    console.step("\n5/5  Report")
    from .quickstart_report import write_report

    report = write_report(folder / "report.html", run, journal.facts, samples)
    console.line(f"  {report}")
    _say_what_next(folder, run, journal.facts, console)


def next_folder(root: Path = DEFAULT_FOLDER) -> Path:
    """`root`, or `root-2`, `root-3`, ...: the first that is free or not finished."""
    number = 1
    while True:
        folder = root if number == 1 else root.with_name(f"{root.name}-{number}")
        if not (folder / "report.html").exists():
            return folder
        number += 1


class _Journal:
    """`quickstart.json`: the plan and the facts of the finished stages."""

    def __init__(self, path: Path, plan: QuickstartPlan, facts: dict[str, Any]):
        self.path, self.plan, self.facts = path, plan, facts

    @classmethod
    def at(cls, folder: Path, plan: QuickstartPlan) -> "_Journal":
        path = folder / "quickstart.json"
        if (folder / "report.html").exists():
            raise BadInput(f"--out {folder} holds a finished quickstart: give a new folder.")
        if path.is_file():
            try:
                written = json.loads(path.read_text(encoding="utf-8"))
                before, facts = QuickstartPlan(**written["plan"]), dict(written["facts"])
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{path} cannot be read ({error}): give a new folder with --out.") from error
            if before != plan:
                raise BadInput(
                    f"--out {folder} was begun with other choices ({before.parent_steps} and {before.diffusion_steps} "
                    f"steps, seed {before.seed}): repeat those, or give a new folder."
                )
            return cls(path, plan, facts)
        RunDirectory.check_free(folder)
        with explained_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
        journal = cls(path, plan, {})
        journal.note()
        return journal

    def note(self, **facts: Any) -> None:
        """Adds facts and writes the file."""
        self.facts.update(facts)
        write_json(self.path, {"plan": asdict(self.plan), "facts": self.facts})

    def timed(self, stage: str) -> "_Timed":
        """Adds the time that the block takes to `seconds[stage]`; a stage that is continued adds up."""
        return _Timed(self, stage)


class _Timed:
    def __init__(self, journal: _Journal, stage: str):
        self.journal, self.stage = journal, stage

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *exc_info) -> None:
        seconds = dict(self.journal.facts.get("seconds", {}))
        seconds[self.stage] = round(seconds.get(self.stage, 0.0) + time.monotonic() - self.began, 1)
        self.journal.note(seconds=seconds)


def _make_text(folder: Path, console: Console) -> Path:
    console.note("loading torch and transformers")
    from .quickstart_parent import write_reference_text

    path = write_reference_text(folder / "python_reference.txt")
    characters = len(path.read_text(encoding="utf-8"))
    console.note(f"the Python language reference that every Python carries: {characters:,} characters")
    return path


def _settings(text: Path, plan: QuickstartPlan) -> dict[str, Any]:
    """What the conversion is told; the parent's rows are made with the same, so that both saw the same text."""
    from .quickstart_parent import CONTEXT, HELD_OUT

    return {
        "data": str(text),
        "max_length": CONTEXT,
        "held_out": HELD_OUT,
        "max_steps": plan.diffusion_steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": DIFFUSION_RATE,
        "seed": plan.seed,
    }


def _make_parent(target: Path, text: Path, plan: QuickstartPlan, journal: _Journal, console: Console) -> None:
    if "parent" in journal.facts:
        console.note("the parent is trained already")
        return
    from .conversion_settings import ConversionSettings
    from .data import read_rows
    from .quickstart_parent import CONTEXT, ParentSize, train_parent, train_tokenizer
    from .training_run import prepare_data

    with journal.timed("parent"):
        tokenizer = train_tokenizer(text.read_text(encoding="utf-8"))
        settings = ConversionSettings(source=str(target), **_settings(text, plan))
        rows = prepare_data(read_rows(text), tokenizer, settings, CONTEXT)
        scratch = target.with_name(".scratch")
        model, losses = train_parent(
            target,
            tokenizer,
            rows.train,
            ParentSize(steps=plan.parent_steps, batch_size=BATCH_SIZE),
            seed=plan.seed,
            console=console,
            scratch=scratch,
        )
        shutil.rmtree(scratch, ignore_errors=True)
    journal.note(
        parent={
            "parameters": model.num_parameters(),
            "vocabulary": len(tokenizer),
            "train_rows": len(rows.train),
            "steps": plan.parent_steps,
            "losses": losses,
        }
    )
    console.note(
        f"trained a Qwen3-shaped model of {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}: "
        f"loss {losses[0][1]:.2f} to {losses[-1][1]:.2f}"
    )
    console.note(f"saved as an ordinary checkpoint: {target}")


def _show_detection(parent: Path, console: Console) -> None:
    from .detection import detect
    from .detection.rendering import render

    render(detect(parent), console)


def _convert(parent: Path, run_path: Path, text: Path, plan: QuickstartPlan, console: Console) -> RunDirectory:
    if (run_path / "manifest.json").exists():
        run = resume(run_path, console=console)
    else:
        run = convert(parent, run_path, console=console, **_settings(text, plan))
    results = run.manifest["results"]
    before, after, parent_nll = (results[name] for name in ("nelbo_before", "nelbo_after", "parent_nll"))
    console.note("on held-out text, nats per token (lower is better):")
    console.note(f"    {before['nats_per_token']:.2f}   converted, before training (NELBO)")
    console.note(f"    {after['nats_per_token']:.2f}   converted, after training  (NELBO, an upper bound)")
    console.note(f"    {parent_nll['nats_per_token']:.2f}   the parent, left to right   (exact)")
    return run


def _say_what_next(folder: Path, run: RunDirectory, facts: dict[str, Any], console: Console) -> None:
    console.line()
    console.line(f"Done in {duration(sum(facts['seconds'].values()))}. Open {folder / 'report.html'} in a browser.")
    console.line()
    console.step("Next")
    for command, comment in next_commands(run.path):
        console.line(f"  {command}")
        console.line(console.style(f"      {comment}", "dim"))


def next_commands(run_path: Path) -> list[tuple[str, str]]:
    """What to type after the quickstart, and why."""
    return [
        (f'a2d sample {run_path} -p "The \\"while\\" statement"', "write more with the model you have just made"),
        ("hf download Qwen/Qwen3-0.6B", "fetch a real model"),
        ("a2d detect Qwen/Qwen3-0.6B", "whether and how it converts, from its config alone"),
        ("a2d convert Qwen/Qwen3-0.6B --out runs/qwen3", "surgery and proof, no training"),
        (
            "a2d convert Qwen/Qwen3-0.6B --out runs/qwen3-mdlm --data my_texts.jsonl",
            'the same, then training on your data: one {"text": ...} or {"messages": [...]} per line; wants a GPU',
        ),
    ]
