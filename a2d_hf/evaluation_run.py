"""The whole of `a2d eval`: which text, which models, in which order, and what the report says of it.

Owns the settings of an evaluation and the content of `report.json` and `timings.json`. report.json holds nothing of
this machine, so that the same seed gives the same bytes; what a clock measured stands in timings.json. Measuring is
evaluation_subject.py's, the page evaluation_report.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import evaluate, throughput
from .accuracy_parallelism import aup
from .atomic_files import explained_writes, write_json
from .console import Console
from .conversion_settings import ConversionSettings
from .converted_model import ConvertedModel, find_converted, resolve_device
from .data_reading import read_data
from .errors import A2DError, BadInput
from .evaluation_parts import Parts
from .evaluation_subject import OneModel, Parent, Subject, Text
from .infilling_accuracy import SPANS, Gap, score_fills
from .likelihood import MC_NUM
from .provenance import hardware
from .source import inspect_source
from .surgery import load_tokenizer
from .training_run import prepare_data, read_held_out


CAVEATS = (
    "The NELBO is an upper bound on the negative log-likelihood, not a perplexity: it is never below the model's true "
    "NLL, and how far above is not known. A gap to the parent's exact NLL is partly the looseness of the bound.",
    "Standard errors are over texts (and masks), for this text alone.",
)


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What to measure; fields as the flags of `a2d eval`.

    Raises:
        [`BadInput`]: a number that makes no sense.
    """

    data: str | None = None
    parent: str | None = None
    against: str | None = None
    mc_samples: int = evaluate.MC_SAMPLES
    max_tokens: int = 65536
    max_length: int | None = None
    batch_size: int = 8
    infill_spans: int = SPANS
    samples: int = 2
    sweep: bool = False
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    likelihood: str = "nelbo"
    mc_num: int = MC_NUM
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False
    fresh: bool = False

    def __post_init__(self):
        for name, least in {
            "mc_samples": 1, "max_tokens": 1, "batch_size": 1, "mc_num": 1, "infill_spans": 0, "samples": 0,
            "limit": 1, "num_fewshot": 0, "seed": 0,
        }.items():  # fmt: skip
            value = vars(self)[name]
            if value is not None and value < least:
                raise BadInput(f"--{name.replace('_', '-')} must be {least} or more, not {value}.")

    @property
    def protocol(self) -> dict[str, Any]:
        """How tasks are asked, the same on both sides."""
        return {
            "include_path": self.include_path,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "seed": self.seed,
        }

    @property
    def protocol_key(self) -> dict[str, Any]:
        """The same as plain values, with the content of the task files."""
        files = sorted(self.include_path.rglob("*.*")) if self.include_path else []
        texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.suffix in (".yaml", ".py")}
        return self.protocol | {"include_path": texts}


@dataclass
class Evaluation:
    """
    Attributes:
        report (`dict`): content of report.json.
        timings (`dict`): content of timings.json.
        reused (`list[str]`): parts that were there from an earlier call.
    """

    report: dict[str, Any]
    timings: dict[str, Any]
    reused: list[str] = field(default_factory=list)


def evaluate_run(found: ConvertedModel, folder: Path | None, settings: EvaluationSettings, console: Console
                 ) -> Evaluation:  # fmt: skip
    """
    Measures, writes `report.json` and `timings.json` into `folder` (where there is one), and returns both.

    Args:
        found ([`ConvertedModel`]): what is measured.
        folder (`Path`, *optional*): where reports and finished parts are kept; `None` keeps nothing.
        settings ([`EvaluationSettings`]): what to measure.
        console ([`Console`]): where progress is shown.
    """
    settings = replace(settings, device=resolve_device(settings.device))
    other = None if settings.against is None else find_converted(settings.against, "--against")
    rows, about = _rows(found, settings)
    text = Text(evaluate.usable_rows(rows, settings.max_tokens))
    parts = Parts(
        None if folder is None else folder / "parts", {"seed": settings.seed, "device": settings.device},
        settings.fresh,
    )  # fmt: skip
    shared = (text, parts, OneModel(), settings, console)
    subject = Subject(found, "the conversion" if other is None else _name(found), *shared)
    parent, absent = _parent(found, settings, shared)
    timings: dict[str, Any] = {"schema_version": 1, "hardware": hardware(), "batch_size": settings.batch_size}

    measured = _measured(subject, parent, timings)
    report = {
        "schema_version": 2,
        "model": _name(found),
        "text": about | {"rows": len(text.rows), "tokens": sum(text.counts)},
        "mc_samples": settings.mc_samples,
        "seed": settings.seed,
        "objective": measured.pop("objective"),
        "block_size": measured.pop("block_size"),
        "nelbo": measured.pop("nelbo"),
        "parent": absent if parent is None else {"available": True, "reason": None, "name": parent.name},
        **measured,
        "against": None,
        "caveats": list(CAVEATS),
    }
    if parent is not None:
        report["parent"]["nll"] = evaluate.estimate(parent.row_nlls(), text.counts).to_dict()
    if other is not None:
        notes = _comparable(found, other, settings)
        second = Subject(other, _name(other), *shared)
        against_timings: dict[str, Any] = {}
        differences = [b - a for a, b in zip(subject.row_nelbos(), second.row_nelbos(), strict=True)]
        report["against"] = {
            "model": _name(other),
            **_measured(second, parent, against_timings),
            "difference": evaluate.estimate(differences, text.counts).to_dict(),
            "notes": notes,
        }
        timings["against"] = against_timings
    if folder is not None:
        write_json(folder / "timings.json", timings)
        write_json(folder / "report.json", report)
    return Evaluation(report, timings, parts.reused)


def _name(found: ConvertedModel) -> str:
    return found.path.name if found.run is None else found.run.path.name


def _rows(found: ConvertedModel, settings: EvaluationSettings) -> tuple[list[dict[str, list[int]]], dict[str, Any]]:
    """Rows to measure on, and what the report says of them."""
    if settings.data is None:
        rows = [] if found.run is None else read_held_out(found.run)
        if not rows:
            raise BadInput(f"RUN {found.name} holds no held-out text: give some with --data.")
        return rows, {"name": "held out from the run's data", "sha256": found.run.manifest["data"]["sha256"]}
    from .modeling.configuration_a2d import A2DConfig

    config = A2DConfig.from_pretrained(found.path, trust_remote_code=settings.trust_remote_code)
    reading = ConversionSettings(
        source="", held_out=0.0, max_length=settings.max_length, token_shift=config.token_shift
    )
    tokenizer = load_tokenizer(found.path, settings.trust_remote_code)
    data = prepare_data(read_data(settings.data), tokenizer, reading, config.max_position_embeddings)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in data.train]
    return rows, {"name": data.facts["name"], "sha256": data.facts["sha256"], "notes": data.facts["notes"]}


def _parent(
    found: ConvertedModel, settings: EvaluationSettings, shared: tuple
) -> tuple[Parent | None, dict[str, Any]]:
    """The parent, or why there is none."""
    if settings.parent is None and (found.run is None or "source" not in found.run.manifest):
        reason = "the checkpoint does not say where its parent is: give --parent"
        return None, {"available": False, "reason": reason}
    place = settings.parent or found.run.manifest["source"]["path"]
    try:
        source = inspect_source(place, "--parent")
    except A2DError as error:
        if settings.parent is not None:
            raise
        return None, {"available": False, "reason": f"the parent is not where it was: {error}"}
    expected = found.manifest and found.manifest["source"]["sha256"]
    sha256 = source.fingerprint()["sha256"]
    if expected and sha256 != expected:
        return None, {"available": False, "reason": f"{place} is not the parent: its files have another hash"}
    return Parent(source.path, source.name, sha256, *shared), {}


def _comparable(found: ConvertedModel, other: ConvertedModel, settings: EvaluationSettings) -> list[str]:
    """
    What a reader of the comparison must know.

    Raises:
        [`BadInput`]: the two read text in other tokens, so that no number of one is comparable with the other's.
    """
    ours, theirs = (load_tokenizer(each.path, settings.trust_remote_code).get_vocab() for each in (found, other))
    if any(theirs.get(token, number) != number for token, number in ours.items()) or len(ours) != len(theirs):
        raise BadInput(
            f"--against {settings.against} reads text in other tokens than {found.name}: numbers per token can only "
            "be compared between models with one tokenizer."
        )
    data = [each.manifest and (each.manifest["data"] or {}).get("sha256") for each in (found, other)]
    held_out = [each.run and read_held_out(each.run) for each in (found, other)]
    if settings.data is None and (data[0] != data[1] or held_out[0] != held_out[1]):
        return [f"{_name(other)} held out other rows: it may have been trained on this text."]
    return []


def _measured(subject: Subject, parent: Parent | None, timings: dict[str, Any]) -> dict[str, Any]:
    """Everything about one converted model, and the parent beside it; the model's own measurements come first."""
    settings, text = subject.settings, subject.text
    totals = subject.row_nelbos()
    masked = subject.masked_accuracy()
    filled = subject.infilling() if settings.infill_spans else []
    written = subject.samples() if settings.samples else []
    swept = subject.sweep() if settings.sweep else None
    curve = subject.infilling_curve() if settings.sweep else []
    scores = {name: subject.task(name) for name in settings.tasks}
    swept_tasks = {name: _swept_task(subject, name, scores[name]) for name in settings.tasks if settings.sweep}
    beside = {name: _side_by_side(scores[name], name, parent) for name in settings.tasks}
    curves = [_task_curve(beside[name][0], points) for name, points in swept_tasks.items() if points]

    gap = None
    if parent is not None:
        nlls = parent.row_nlls()
        gap = evaluate.estimate([a - b for a, b in zip(totals, nlls, strict=True)], text.counts).to_dict()
        if written:
            tokenizer = load_tokenizer(subject.found.path, settings.trust_remote_code)
            texts = parent.samples(len(written), subject.new_tokens, tokenizer)
            written = [sample | {"parent_text": text} for sample, text in zip(written, texts, strict=True)]
    return {
        "objective": subject.config.objective,
        "block_size": subject.config.block_size,
        "nelbo": evaluate.estimate(totals, text.counts).to_dict(),
        "gap": gap,
        "masked_accuracy": masked,
        "infilling": _infilling(filled, text, parent),
        "throughput": swept and _throughput(subject, swept, curve, parent, timings),
        "tasks": [line for name in settings.tasks for line in beside[name]],
        "task_curves": curves,
        "samples": written,
    }


def _infilling(filled: Sequence[dict[str, Any]], text: Text, parent: Parent | None) -> list[dict[str, Any]]:
    """Accuracy by length, the parent's from the left side alone beside it."""
    theirs = parent.infilling(list(filled)) if parent is not None and filled else [None] * len(filled)
    table = []
    for entry, written in zip(filled, theirs, strict=True):
        gaps = [Gap(**gap) for gap in entry["gaps"]]
        line = {"length": entry["length"], "spans": 0}
        if gaps:
            line |= score_fills(gaps, text.rows, entry["fills"])
            line["parent"] = None if written is None else score_fills(gaps, text.rows, written)
        table.append(line)
    return table


def _throughput(
    subject: Subject,
    swept: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    curve: list[dict[str, Any]],
    parent: Parent | None,
    timings: dict[str, Any],
) -> dict[str, Any]:
    points, times = swept
    opinions = [{} for _ in points] if parent is None else parent.judged(points)
    names = [throughput.setting_name(point["setting"]) for point in points]
    timings["throughput"] = [{"setting": name, **each} for name, each in zip(names, times, strict=True)]
    beside = None
    if parent is not None:
        beside, timings["parent_throughput"] = parent.speed(subject.new_tokens, subject.never)
    accuracies = []
    for entry in curve:
        gaps = [Gap(**gap) for gap in entry["gaps"]]
        if gaps:
            scored = score_fills(gaps, subject.text.rows, entry["fills"])
            accuracies.append(
                {"length": entry["length"], "steps": entry["steps"], "tokens_per_forward": entry["tokens_per_forward"]}
                | scored
            )
    return {
        "prompts": len(points[0]["sequences"]),
        "prompt_tokens": subject.text.prompt,
        "new_tokens": subject.new_tokens,
        "points": [
            {"name": name} | {key: value for key, value in point.items() if key != "sequences"} | opinion
            for name, point, opinion in zip(names, points, opinions, strict=True)
        ],
        "parent": beside,
        "infilling_curve": accuracies,
        "aup": aup([(each["tokens_per_forward"], 100 * each["token_accuracy"]) for each in accuracies])
        if accuracies
        else None,
    }


def _side_by_side(scores: list[dict[str, Any]], name: str, parent: Parent | None) -> list[dict[str, Any]]:
    """Each number of a task with the parent's own beside it."""
    beside = {(line["task"], line["metric"]): line for line in (parent.task(name) if parent is not None else [])}
    lines = []
    for line in scores:
        theirs = beside.get((line["task"], line["metric"]), {})
        value, error = theirs.get("value"), theirs.get("stderr")
        lines.append(line | {"parent_value": value, "parent_stderr": error})
    return lines


def _swept_task(subject: Subject, name: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A task at every setting, where its answers are written and its metric is a share; not a group of tasks."""
    if not lines or lines[0]["new_tokens"] is None or len({line["task"] for line in lines}) > 1:
        return []
    if lines[0]["value"] is None or not 0 <= lines[0]["value"] <= 1:
        return []
    return subject.task_curve(name, lines[0]["new_tokens"])


def _task_curve(line: dict[str, Any], points: list[dict[str, Any]]) -> dict[str, Any]:
    """The first metric of a task against tokens per forward, with an AUP for each way to write faster."""
    found = [
        {"name": point["name"], "setting": point["setting"], "tokens_per_forward": point["tokens_per_forward"]}
        | {key: point["lines"][0][key] for key in ("value", "stderr")}
        for point in points
    ]
    drawn = {
        way: [(p["tokens_per_forward"], 100 * p["value"]) for p in found if way in p["setting"]]
        for way in ("steps", "threshold")
    }
    # One yardstick for both ways, so that their areas can be compared.
    best = max(y for each in drawn.values() for _, y in each)
    return {
        **{key: line[key] for key in ("task", "metric", "examples", "new_tokens", "parent_value", "parent_stderr")},
        "points": found,
        "aup": {way: aup(each, best) for way, each in drawn.items()},
    }


def report_folder(found: ConvertedModel, out: Path | None) -> Path | None:
    """Where the report goes: `--out`, the run's `eval`, or nowhere."""
    folder = out if out is not None else None if found.run is None else found.run.eval_path
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--out {folder} is a file: give a folder.")
        with explained_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
    return folder
