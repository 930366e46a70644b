"""The quickstart's page: what happened, in words that need no background, with the numbers and the pictures.

Owns its text and order. The HTML is report.py's, the pictures are denoising_picture.py's. Reads the run's manifest and
events; writes the one file that it is asked to write.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .console import duration
from .denoising_picture import (
    denoising_grid,
    denoising_legend,
    denoising_snapshots,
    denoising_text,
)
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
    from .quickstart_samples import Sample


def write_report(path: Path, run: RunDirectory, facts: dict[str, Any], samples: "list[Sample]") -> Path:
    """
    Writes the page.

    Args:
        path (`Path`): the file.
        run ([`RunDirectory`]): the finished conversion.
        facts (`dict`): of the parent, from quickstart.json.
        samples (`list[Sample]`): texts with their history; the last one fills a gap.

    Returns:
        `Path`: `path`.
    """
    manifest = run.manifest
    results = {name: value["nats_per_token"] for name, value in manifest["results"].items()}
    seconds = facts["seconds"]
    total = duration(sum(seconds.values()))
    tiles = [
        Tile(f"{manifest['parameters']:,}", "parameters in the parent"),
        Tile(
            f"{_identity_difference(manifest)}", "largest difference between parent and conversion, read left to right"
        ),
        Tile(
            f"{results['nelbo_before']:.2f} → {results['nelbo_after']:.2f}",
            "diffusion loss on held-out text, before and after training",
        ),
        Tile(f"{results['parent_nll']:.2f}", "the parent's own loss on that text"),
    ]
    sections = [
        Section("Watching it write", _watching(samples[0])),
        Section("What happened", _what_happened(manifest, facts)),
        Section("The proof", _proof(manifest)),
        Section("The training", _training(run, facts, results)),
        Section("Beside its parent", _beside_parent(samples[:-1])),
        Section("Filling a gap", _gap(samples[-1])),
        Section("Next: a real model", _next(run)),
    ]
    lead = (
        f"In {total}, offline, a small language model was trained, turned into a diffusion language model without "
        "changing what it had learned, and then taught to write in any order."
    )
    return write_page(
        path, page("From left-to-right to diffusion", lead, sections, tiles=tiles, footer=_footer(manifest))
    )


def _identity_difference(manifest: dict[str, Any]) -> str:
    difference = manifest["gates"]["identity"]["detail"]["max_abs_diff"]
    return "0" if difference == 0 else f"{difference:.1e}"


def _what_happened(manifest: dict[str, Any], facts: dict[str, Any]) -> Markup:
    parent, data, mask = facts["parent"], manifest["data"], manifest["mask_token"]
    seconds = facts["seconds"]
    grown = mask["rows_after"] - mask["rows_before"]
    rows = [
        (
            "Parent",
            f"An ordinary {manifest['source']['model_type']} model with {parent['parameters']:,} parameters learned "
            f"the Python language reference, one token after the other. It reads and writes from left to right.",
            duration(seconds["parent"]),
        ),
        (
            "Detect",
            "Its config.json alone says that it can be converted, and what its attention is like.",
            "",
        ),
        (
            "Convert",
            f"Attention was opened to both sides and a mask token was added, which means “blank” "
            f"(id {mask['id']}; {grown or 'no'} new row{'' if grown == 1 else 's'} in the embedding). "
            "No other number changed.",
            "",
        ),
        ("Prove", "Three gates checked that before any training. A failed gate would have stopped here.", ""),
        (
            "Train",
            f"{manifest['training']['steps']:,} steps of masked diffusion: hide a random share of each text, "
            "guess what was hidden.",
            duration(seconds["conversion"]) + " with the gates and the measuring",
        ),
        ("Write", "Start from blanks only and fill in the surest ones first.", duration(seconds["sampling"])),
    ]
    note = (
        f"{data['train']['rows']:,} pieces of text were trained on. {data['held_out']['rows']:,} others, the end of "
        "the text, neither model has seen: “held-out” means measured on those."
    )
    return join(table(("Stage", "What it did", "Time"), rows), paragraphs(note))


def _proof(manifest: dict[str, Any]) -> Markup:
    meaning = {
        "mask_row": "The mask token has a sensible starting vector.",
        "identity": "Read left to right, the conversion gives exactly the parent's numbers.",
        "reach": "Read both ways, every word can see every other, layer by layer.",
    }
    rows = [
        (
            name,
            verdict(gate["passed"]),
            join(
                Markup("{}").format(meaning.get(name, "")),
                Markup('<span class="soft">{}</span>').format(gate["message"]),
            ),
        )
        for name, gate in manifest["gates"].items()
    ]
    return table(("Gate", "Result", "What it means"), rows)


def _training(run: RunDirectory, facts: dict[str, Any], results: dict[str, float]) -> Markup:
    events, _ = read_events(run.path / "events.jsonl")
    points = [
        (event["step"], event["loss"])
        for event in events
        if event["event"] == "train_step" and event.get("loss") is not None
    ]
    parent_points = [(step, loss) for step, loss in facts["parent"]["losses"]]
    diffusion = line_chart(
        [Series("", points, colour=0, smooth=max(1, len(points) // 12))],
        levels=[
            Level(f"before training {results['nelbo_before']:.2f}", results["nelbo_before"], 0),
            Level(f"after, held-out {results['nelbo_after']:.2f}", results["nelbo_after"], 0),
            Level(f"the parent, held-out {results['parent_nll']:.2f}", results["parent_nll"], 1),
        ],
        x_label="training step of the conversion",
        y_label="nats per token",
        alt=(
            f"Diffusion loss against training steps, from {points[0][1]:.2f} to {results['nelbo_after']:.2f} "
            f"on held-out text; the parent stands at {results['parent_nll']:.2f}."
        ),
    )
    parent = line_chart(
        [Series("", parent_points, colour=1)],
        levels=[Level(f"held-out {results['parent_nll']:.2f}", results["parent_nll"], 1)],
        x_label="training step of the parent",
        y_label="nats per token",
        alt=f"The parent's loss against training steps, ending at {results['parent_nll']:.2f} on held-out text.",
    )
    blind = math.log(facts["parent"]["vocabulary"])
    return join(
        paragraphs(
            "Lower is better: the number says how surprised a model is by each token. 0 would be never, "
            f"{blind:.1f} is guessing blindly among this vocabulary.",
            "The two losses are not the same kind of number. The parent's is exact. The diffusion model's (the NELBO) "
            "is an upper bound, averaged over all orders in which a text could be filled in, most of them harder than "
            "left to right. A gap between them is expected; that the blue line falls so far in so little time is the "
            "point: it starts from what the parent knew.",
        ),
        figure(
            diffusion,
            "Learning to fill in blanks. Dots are single measurements, noisy by nature: how many tokens are hidden is "
            "drawn anew each time. The line is their running mean.",
        ),
        figure(parent, "For comparison: the parent, learning to predict the next token."),
    )


def _watching(shown: "Sample") -> Markup:
    denoising = shown.denoising
    return join(
        paragraphs(
            f"{len(denoising.pieces)} blanks after the prompt, filled in {shown.num_forwards} passes through the "
            f"model. A model that writes from left to right needs {len(denoising.pieces)}. The colour under each "
            "token says when it was filled in."
        ),
        denoising_legend(),
        denoising_text(denoising, name="replay"),
        figure(
            denoising_grid(denoising),
            "The same text as a picture: each column is one position in the text, each row one pass.",
        ),
        denoising_snapshots(denoising),
    )


def _beside_parent(samples: "list[Sample]") -> Markup:
    parts = [
        paragraphs(
            "The same prompts, continued by both. Expect the look of the Python reference rather than sense: these "
            "models are about a thousand times smaller than useful ones, and one small book is all they have read."
        )
    ]
    for shown in samples:
        denoising = shown.denoising
        parts += [
            Markup('<p class="soft">diffusion, {} passes</p>').format(shown.num_forwards),
            sample(denoising.prompt, "".join(denoising.pieces)),
            Markup('<p class="soft">parent, {} passes</p>').format(shown.new_tokens),
            sample(denoising.prompt, shown.parent_text),
        ]
    return join(*parts)


def _gap(shown: "Sample") -> Markup:
    denoising = shown.denoising
    filled = Markup("").join(
        Markup('<span class="tok t{}">{}</span>').format(9 * (step - 1) // max(1, denoising.num_steps - 1), piece)
        for piece, step in zip(denoising.pieces, denoising.steps, strict=True)
    )
    return join(
        paragraphs(
            "A model that writes from left to right cannot look at what comes after a gap. This one can: the grey "
            "text on both sides was given, the underlined part was filled in."
        ),
        Markup('<div class="sample"><span class="prompt">{}</span>{}<span class="prompt">{}</span></div>').format(
            denoising.prompt, filled, shown.suffix
        ),
    )


def _next(run: RunDirectory) -> Markup:
    from .quickstart import next_commands

    lines = [f"# {comment}\n{command}" for command, comment in next_commands(run.path)]
    return join(
        paragraphs("The same commands work on any supported checkpoint from the Hugging Face Hub."),
        code_block("\n\n".join(lines)),
    )


def _footer(manifest: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)
    return (
        f"Seed {manifest['config']['seed']}. {versions}. Text: the Python language reference (PSF licence), "
        "from the standard library's pydoc_data."
    )
