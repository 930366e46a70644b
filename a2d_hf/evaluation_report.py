"""The page of `a2d eval`: what was converted from what, how well it does, how fast, and how to measure it again.

Owns its text and order. The HTML is report.py's, the pictures are denoising_picture.py's. Reads the evaluation and the
run's manifest and events; writes the one file that it is asked to write.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .denoising_picture import Denoising, denoising_grid, denoising_legend, denoising_text
from .evaluation_charts import accuracy_curve, masked_chart, speed, task_curve
from .report import (
    Level,
    Section,
    Series,
    Tile,
    code_block,
    figure,
    join,
    line_chart,
    page,
    paragraphs,
    sample,
    table,
    verdict,
    write_page,
)
from .run_directory import RunDirectory, read_events


if TYPE_CHECKING:
    from .evaluation_run import Evaluation


def write_evaluation_page(path: Path, evaluation: "Evaluation", run: RunDirectory | None, command: str) -> Path:
    """
    Writes the page.

    Args:
        path (`Path`): the file.
        evaluation ([`Evaluation`]): what was measured.
        run ([`RunDirectory`], *optional*): where the model comes from, for its gates and training curve.
        command (`str`): what measures the same again.

    Returns:
        `Path`: `path`.
    """
    report, manifest = evaluation.report, None if run is None else run.manifest
    sections = [Section("On text it has not seen", _likelihood(report))]
    if report["against"] is not None:
        sections.append(
            Section(f"{report['model']} beside {report['against']['model']}", _against(report, evaluation.timings))
        )
    sections.append(Section("Filling in blanks", _filling(report)))
    if report["tasks"]:
        sections.append(Section("Tasks", _tasks(report)))
    if report["throughput"] is not None:
        sections.append(Section("Speed, and what it costs", speed(report, evaluation.timings)))
    if report["samples"]:
        sections.append(Section("What it writes", _samples(report)))
    if manifest is not None:
        sections.append(Section("Where it comes from", _origin(manifest)))
        curve = _training(run)
        if curve is not None:
            sections.append(Section("Its training", curve))
    sections.append(Section("How to read this, and how to measure it again", _again(report, manifest, command)))
    return write_page(
        path,
        page(
            f"{report['model']}: what the conversion cost and what it bought",
            _lead(report, manifest),
            sections,
            tiles=_tiles(report, evaluation.timings),
            footer=_footer(report, evaluation.timings, manifest),
        ),
    )


def _lead(report: dict[str, Any], manifest: dict[str, Any] | None) -> str:
    kind = "block diffusion" if report["objective"] == "bd3lm" else "masked diffusion"
    origin = ""
    if manifest is not None:
        source = manifest["source"]
        origin = f" that was converted from {source['name']} ({source['model_type']}), an autoregressive model"
    text = report["text"]
    return f"A {kind} language model{origin}, measured on {text['tokens']:,} tokens of text: {text['name']}. " + (
        "Its parent is measured on the same tokens." if report["parent"]["available"] else ""
    )


def _tiles(report: dict[str, Any], timings: dict[str, Any]) -> list[Tile]:
    tiles = [Tile(_nats(report["nelbo"]), "NELBO in nats per token: an upper bound, lower is better")]
    if report["parent"]["available"]:
        tiles.append(Tile(_nats(report["parent"]["nll"]), "the parent's exact NLL on the same tokens"))
    half = next(row for row in report["masked_accuracy"] if row["ratio"] == 0.5)
    tiles.append(Tile(f"{half['accuracy']:.0%}", "of tokens right in one pass, half of the text hidden"))
    if report["throughput"] is not None and report["throughput"]["parent"] is not None:
        pairs = zip(report["throughput"]["points"], timings["throughput"], strict=True)
        point, clock = max(pairs, key=lambda pair: pair[1]["tokens_per_second"])
        ratio = clock["tokens_per_second"] / timings["parent_throughput"]["tokens_per_second"]
        own = report["throughput"]["parent"]["parent_nll"]
        cost = f"the parent finds that text {point['parent_nll']:.2f} nats per token unlikely, its own {own:.2f}"
        tiles.append(Tile(f"{ratio:.2g}×", f"the parent's speed when it writes with {point['name']}; {cost}"))
    return tiles


def _nats(estimate: dict[str, Any]) -> str:
    return f"{estimate['nats_per_token']:.2f}"


def _pm(value: float | None, error: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if error is None else f"\u00a0±\u00a0{error:.{digits}f}")


def _percent(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if error is None else f"\u00a0±\u00a0{100 * error:.1f}") + "\u00a0%"


# ----------------------------------------------------------------------------------------------------------- the parts


def _likelihood(report: dict[str, Any]) -> Markup:
    nelbo, parent = report["nelbo"], report["parent"]
    rows = [("conversion, NELBO (upper bound)", _pm(nelbo["nats_per_token"], nelbo["standard_error"]))]
    if parent["available"]:
        nll, gap = parent["nll"], report["gap"]
        rows.append((f"parent {parent['name']}, NLL (exact)", _pm(nll["nats_per_token"], nll["standard_error"])))
        rows.append(("difference, text by text", _pm(gap["nats_per_token"], gap["standard_error"])))
    notes = [
        "How surprised a model is by each token of text that it was not trained on (the negative log-likelihood, NLL, "
        "in nats): 0 would be never. The two numbers are of different kinds: the diffusion model's is a bound, "
        "averaged over all orders in which a text could be filled in, most of them harder than left to right."
    ]
    if parent["available"]:
        worse = report["gap"]["nats_per_token"]
        notes.append(
            f"So the conversion cost at most {worse:.2f} nats per token on this text, give or take its standard error."
            if worse > 0
            else "So the conversion cost nothing that this text shows: even the bound is not above the parent."
        )
    if not parent["available"]:
        notes.append(f"The parent could not be measured: {parent['reason']}.")
    return join(paragraphs(*notes), table(("", "nats per token ± standard error"), rows))


def _against(report: dict[str, Any], timings: dict[str, Any]) -> Markup:
    other = report["against"]
    names = (report["model"], other["model"])
    difference = other["difference"]
    mean, error = difference["nats_per_token"], difference["standard_error"]
    rows = [
        ("objective", _objective(report), _objective(other), ""),
        (
            "NELBO, nats per token",
            _pm(report["nelbo"]["nats_per_token"], report["nelbo"]["standard_error"]),
            _pm(other["nelbo"]["nats_per_token"], other["nelbo"]["standard_error"]),
            _pm(mean, error),
        ),
    ]
    for ours, theirs in zip(report["masked_accuracy"], other["masked_accuracy"], strict=True):
        change = 100 * (theirs["accuracy"] - ours["accuracy"])
        label = f"right in one pass, {ours['ratio']:.0%} hidden"
        rows.append((label, _percent(ours["accuracy"]), _percent(theirs["accuracy"]), f"{change:+.1f}"))
    for ours, theirs in zip(report["infilling"], other["infilling"], strict=True):
        cells = [_percent(each.get("token_accuracy"), each.get("token_accuracy_stderr")) for each in (ours, theirs)]
        rows.append((f"gap of {ours['length']}: tokens right", *cells, ""))
    for ours, theirs in zip(report["tasks"], other["tasks"], strict=True):
        cells = [_pm(each["value"], each["stderr"]) for each in (ours, theirs)]
        known = None not in (ours["value"], theirs["value"])
        change = f"{theirs['value'] - ours['value']:+.3f}" if known else ""
        rows.append((f"{ours['task']}, {ours['metric']}", *cells, change))
    if report["throughput"] is not None:
        clocks = (timings["throughput"], timings["against"]["throughput"])
        points = (report["throughput"]["points"], other["throughput"]["points"])
        for number, point in enumerate(points[0]):
            cells = [
                f"{clock[number]['tokens_per_second']:,.0f} tokens/s"
                + (f", {each[number]['parent_nll']:.2f} nats" if "parent_nll" in each[number] else "")
                for clock, each in zip(clocks, points, strict=True)
            ]
            rows.append((f"{point['name']}: speed, parent's NLL", *cells, ""))
    if error is None or error == 0:
        words = f"{names[1]} is {abs(mean):.3f} nats per token {'below' if mean < 0 else 'above'} {names[0]}."
    else:
        words = (
            f"{names[1]} is {abs(mean):.3f} nats per token {'below' if mean < 0 else 'above'} {names[0]}, "
            f"{abs(mean) / error:.1f} standard errors of the difference."
        )
    text = (
        f"{words} Both were given the same texts with the same masks, so the difference is taken text by text, and "
        "what makes a text hard for both drops out of its standard error."
    )
    charts = [masked_chart(report, other)]
    if report["throughput"] is not None:
        charts.append(accuracy_curve(report, other))
    return join(
        paragraphs(text, *other["notes"]),
        table(("", *names, "difference"), rows),
        *[chart for chart in charts if chart is not None],
    )


def _objective(report: dict[str, Any]) -> str:
    return f"bd3lm, blocks of {report['block_size']}" if report["objective"] == "bd3lm" else report["objective"]


def _filling(report: dict[str, Any]) -> Markup:
    parts = [masked_chart(report)] if report["against"] is None else []
    with_parent = report["parent"]["available"]
    rows, skipped = [], []
    for line in report["infilling"]:
        if not line["spans"]:
            skipped.append(str(line["length"]))
            continue
        cells = [_percent(line[name], line[f"{name}_stderr"]) for name in ("token_accuracy", "span_accuracy")]
        if with_parent:
            cells += [_percent(line["parent"][name]) for name in ("token_accuracy", "span_accuracy")]
        rows.append((str(line["length"]), *cells, str(line["spans"])))
    if rows:
        headers = ["Tokens in the gap", "tokens right", "whole gap right"]
        headers += ["parent: tokens", "parent: whole gap"] if with_parent else []
        parts += [
            paragraphs(
                "A gap is cut into each text, its length told, the text on both sides given. Right means: exactly the "
                "token that stood there; another good word counts as wrong."
                + (" The parent can read the left side only, and continues it greedily." if with_parent else "")
            ),
            table((*headers, "gaps"), rows),
        ]
    if skipped:
        why = "no text has room for it"
        if report["objective"] == "bd3lm":
            why += ", or this block-diffusion model would not see what stands behind it"
        parts.append(paragraphs(f"Not measured: gaps of {', '.join(skipped)} tokens ({why})."))
    return join(*parts)


def _tasks(report: dict[str, Any]) -> Markup:
    rows = [
        (
            line["task"],
            line["metric"],
            _pm(line["value"], line["stderr"]),
            _pm(line["parent_value"], line["parent_stderr"]),
            str(line["examples"] or ""),
            str(line["num_fewshot"] if line["num_fewshot"] is not None else ""),
        )
        for line in report["tasks"]
    ]
    return join(
        paragraphs(
            "Tasks of lm-evaluation-harness with the same examples and prompts on both sides. A difference within two "
            "standard errors or so may be chance, and so may a score that near to guessing."
        ),
        table(("Task", "metric", "conversion", "parent", "examples", "shots"), rows),
        *[task_curve(curve) for curve in report["task_curves"]],
    )


def _samples(report: dict[str, Any]) -> Markup:
    parts = [denoising_legend()]
    for number, each in enumerate(report["samples"]):
        denoising = Denoising(**each["denoising"] | {"given": {}})
        parts += [
            Markup('<p class="soft">diffusion, {} passes for {} tokens</p>').format(
                each["num_forwards"], len(denoising.pieces)
            ),
            denoising_text(denoising, name=f"sample{number}"),
            figure(denoising_grid(denoising), "Each column is one position in the text, each row one pass."),
        ]
        if "parent_text" in each:
            parts += [
                Markup('<p class="soft">the parent, after the same prompt</p>'),
                sample(denoising.prompt, each["parent_text"]),
            ]
    return join(*parts)


def _origin(manifest: dict[str, Any]) -> Markup:
    source, mask = manifest["source"], manifest["mask_token"]
    training = manifest.get("training") or {}
    trained = "not trained"
    if training:
        trained = f"{training['steps']:,} steps of {training['rows_per_step']} rows on {manifest['data']['name']}"
    rows = [
        ("parent", f"{source['name']}, {source['model_type']}, {manifest['parameters']:,} parameters"),
        ("mask token", f"id {mask['id']}"),
        ("training", trained),
    ]
    gates = [
        (name, verdict(gate["passed"]), Markup('<span class="soft">{}</span>').format(gate["message"]))
        for name, gate in manifest["gates"].items()
    ]
    return join(table(("", ""), rows), table(("Gate", "result", "what it found, before training"), gates))


def _training(run: RunDirectory) -> Markup | None:
    events, _ = read_events(run.path / "events.jsonl")
    points = [
        (event["step"], event["loss"])
        for event in events
        if event["event"] == "train_step" and event.get("loss") is not None and math.isfinite(event["loss"])
    ]
    if not points:
        return None
    levels = [
        Level(f"{label} {value['nats_per_token']:.2f}", value["nats_per_token"], colour)
        for name, label, colour in (
            ("nelbo_before", "before training", 0),
            ("nelbo_after", "after, held-out", 0),
            ("parent_nll", "the parent, held-out", 1),
        )
        if (value := (run.manifest.get("results") or {}).get(name)) is not None
    ]
    chart = line_chart(
        [Series("", points, colour=0, smooth=max(2, len(points) // 12))], levels=levels,
        x_label="training step", y_label="loss, nats per token",
        alt=f"Training loss, from {points[0][1]:.2f} to {points[-1][1]:.2f}.",
    )  # fmt: skip
    return figure(
        chart,
        "Dots are single measurements, noisy by nature: how much is hidden is drawn anew each time. The line is their "
        "running mean.",
    )


def _again(report: dict[str, Any], manifest: dict[str, Any] | None, command: str) -> Markup:
    parts = [paragraphs(*report["caveats"]), code_block(command)]
    closing = "The same seed on the same machine gives the same bytes of report.json; times are in timings.json."
    if manifest is not None:
        closing += f" The conversion's own settings are in manifest.json (seed {manifest['config']['seed']})."
    return join(*parts, paragraphs(closing))


def _footer(report: dict[str, Any], timings: dict[str, Any], manifest: dict[str, Any] | None) -> str:
    from .provenance import library_versions

    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    machine = timings["hardware"]
    place = ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['torch_threads']} threads"
    return f"Seed {report['seed']}, {report['mc_samples']} masks per row. {versions}. Measured on {place}."
