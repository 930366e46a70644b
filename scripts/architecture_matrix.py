"""Every causal language model type that transformers ships, shrunk, converted and tested, one by one.

    python scripts/architecture_matrix.py                 all types: docs/architectures.md and docs/architectures.json
    python scripts/architecture_matrix.py llama gpt_neo   only these, printed

Owns the tables, the README's "what converts" included; a2d_hf/architecture_checks.py owns the checks.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from a2d_hf.architecture_checks import causal_types, check_type


ROOT = Path(__file__).resolve().parents[1]
SECONDS_PER_TYPE = 180
# The columns that say "converts exactly" and those that say "serves every objective and cache".
CORE = ("identity", "reach", "block_causal", "saved", "gradients")
EVERY = (*CORE, "bd3lm", "documents", "cache", "rows", "eager")

# Why a type is not exact, where the measurement alone does not say it: whose limit it is, and what it would take.
REASONS = {
    "dots3_note": "a limit of ours: its vision adapter's width is not among the sizes that shrink with the text "
    "model's; its text model, dots3_note_text, is exact",
    "deepseek_v4": "a limit of transformers: the branch that reads compressed tokens decides by position what is past "
    "and asks for no mask, so it stays causal; opening it would take a mask in the library. `a2d convert` refuses it",
    "gemma3n": "a limit of this installation: transformers builds its vision tower from timm; its text model, "
    "gemma3n_text, is exact",
    "gemma4_assistant": "a draft head of another model, with no text model of its own; transformers' default "
    "configuration of it is not valid",
    "inkling_text": "a limit of ours: keys and values run through a causal convolution, whose reach the gate cannot "
    "tell from the window it mirrors in layers that have both; the layers without a window are exact",
    "inkling2_text": "a limit of ours, as for inkling_text",
}


HYBRIDS = (
    "## Hybrids: what is valid",
    "",
    "A recurrent layer (state-space, linear attention, convolution) reads from left to right under every pattern; the "
    "attention layers beside it open.",
    "",
    "| | valid | why |",
    "|---|---|---|",
    "| MDLM | yes, one document per row | attention layers see everything, recurrent ones what stands before |",
    "| annealing, representation alignment, teacher KL, the causal pattern | yes | each is one pass over one text |",
    "| BD3LM | refused | the state would run out of the noisy copy into the clean one, and leak |",
    "| packed documents | refused | the state would run out of one document into the next |",
    "| block-causal decoding | yes | no layer ever lets a later block back into an earlier one |",
    "| the exact block cache of the decoder | not used: decoding runs uncached, the text is the same | a block is run "
    "again at every step, and a state that has read it cannot be taken back |",
)


def run_all(types: list[str], processes: int = 2) -> list[dict[str, Any]]:
    """Checks the types side by side; one that hangs or crashes is a row that says so."""
    import transformers  # noqa: F401  before the fork, so that it is imported once
    from tqdm import tqdm

    import a2d_hf.modeling.gates  # noqa: F401

    rows = []
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        waiting = [(name, pool.apply_async(check_type, (name,))) for name in types]
        for name, result in tqdm(waiting, desc="types", disable=not sys.stderr.isatty()):
            try:
                rows.append(result.get(timeout=SECONDS_PER_TYPE))
            except multiprocessing.TimeoutError:
                rows.append({"type": name, "verdict": "supported", "codes": [], "error": "not done in time"})
    return rows


def passes(row: dict[str, Any], columns: tuple[str, ...]) -> bool:
    """Whether a type passed these columns with its structure intact."""
    return not row.get("error") and not row.get("lost") and all(row.get(column) is True for column in columns)


def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    converts = [row for row in rows if row.get("verdict") in ("supported", "hybrid")]
    return {
        "types": len(rows),
        "decoders_and_hybrids": len(converts),
        "core": sum(passes(row, CORE) for row in converts),
        "every_column": sum(passes(row, EVERY) for row in converts),
        "refused": sum(row.get("verdict") == "unsupported" for row in rows),
    }


def _mark(row: dict[str, Any], column: str) -> str:
    if row.get(column) is True:
        return "yes"
    return "no" if column in row else "–"


def _note(row: dict[str, Any]) -> str:
    measured = _measured(row)
    reason = None if passes(row, CORE) else REASONS.get(row["type"])
    return f"{reason} ({measured})" if reason else measured


def _measured(row: dict[str, Any]) -> str:
    if row.get("error"):
        return " ".join(row["error"].split())
    if row.get("lost"):
        return "lost in shrinking: " + ", ".join(row["lost"])
    if not row.get("reach", True):
        return row["reach_message"]
    if not row.get("identity", True):
        return f"an explicit causal mask differs from the parent by {row['identity_difference']:.0e}"
    reasons = []
    for column in EVERY:
        if row.get(column) is False:
            told = row.get(f"{column}_error")
            reasons.append(f"{column}: {told}" if told else f"{column}: off by {row[f'{column}_difference']:.0e}")
    return "; ".join(reasons)


def write_table(rows: list[dict[str, Any]], seconds: float) -> None:
    import torch
    import transformers

    counts = summary(rows)
    (ROOT / "docs" / "architectures.json").write_text(
        json.dumps(
            {"transformers": transformers.__version__, "torch": torch.__version__, "summary": counts, "rows": rows},
            indent=1,
            sort_keys=True,
        )
        + "\n"
    )
    titles = (
        "identity",
        "reach",
        "block-causal",
        "saved",
        "gradients",
        "BD3LM",
        "documents",
        "cache",
        "rows",
        "eager",
    )
    lines = [
        "# What converts",
        "",
        f"Generated by `python scripts/architecture_matrix.py` with transformers {transformers.__version__} in "
        f"{seconds / 60:.0f} minutes; the numbers behind it are in architectures.json.",
        "",
        f"Of {counts['types']} causal language model types, {counts['decoders_and_hybrids']} are decoders or hybrids; "
        f"{counts['core']} of them convert exactly (identity, reach, block-causality, save/load, gradients) and "
        f"{counts['every_column']} pass every column. {counts['refused']} are refused, with the reason.",
        "",
        "Every row is a tiny random model of the type with its kinds of layers, windows, experts and recurrences kept "
        "(windows and chunks shorter than the probe). *identity*: largest difference to the parent exactly 0, with "
        "windows crossed, also with the causal mask spelled out. *reach*: each layer's open edges are exactly those "
        "it should have. *block-causal*: no leak backward, full inside. *BD3LM*: the doubled sequence equals one pass "
        "per block. *cache*: block decoding with a cache equals without.",
        "",
        "## Decoders and hybrids",
        "",
        "| type | verdict | open layers | " + " | ".join(titles) + " | note |",
        "|---|---|---|" + "---|" * (len(titles) + 1),
    ]
    for row in rows:
        if row.get("verdict") == "unsupported":
            continue
        layers = f"{row['open_layers']} of {row['layers']}" if "layers" in row else "–"
        marks = " | ".join(_mark(row, column) for column in EVERY)
        lines.append(f"| {row['type']} | {row.get('verdict')} | {layers} | {marks} | {_note(row)} |")
    lines += ["", *HYBRIDS, "", "## Refused", "", "| type | reason |", "|---|---|"]
    lines += [f"| {r['type']} | {', '.join(r['codes'])} |" for r in rows if r.get("verdict") == "unsupported"]
    (ROOT / "docs" / "architectures.md").write_text("\n".join(lines) + "\n")
    proven = [row["type"] for row in rows if row.get("verdict") != "unsupported" and passes(row, CORE)]
    (ROOT / "a2d_hf" / "detection" / "proven_types.json").write_text(json.dumps({"types": proven}, indent=1) + "\n")
    _write_readme_counts(counts, rows)


def _write_readme_counts(counts: dict[str, int], rows: list[dict[str, Any]]) -> None:
    """The README's table of what converts, between its two markers."""
    readme = ROOT / "README.md"
    start, end = "<!-- what converts: begin -->", "<!-- what converts: end -->"
    text = readme.read_text()
    if start not in text or end not in text:
        return
    by_verdict = {v: [r for r in rows if r.get("verdict") == v] for v in ("supported", "hybrid", "unsupported")}

    def names(kept: list[dict[str, Any]]) -> str:
        return ", ".join(row["type"] for row in kept)

    exact = [row for row in by_verdict["supported"] if passes(row, CORE)]
    hybrid = [row for row in by_verdict["hybrid"] if passes(row, CORE)]
    rest = [r for v in ("supported", "hybrid") for r in by_verdict[v] if not passes(r, CORE)]
    table = [
        "| | types | which |",
        "|---|---|---|",
        f"| convert exactly | {len(exact)} | {names(exact)} |",
        f"| convert in part: attention layers open, recurrent ones stay causal (`--allow-hybrid`) | {len(hybrid)} | "
        f"{names(hybrid)} |",
        f"| decoders not exact yet, each with its reason in docs/architectures.md | {len(rest)} | {names(rest)} |",
        f"| refused: encoders, encoder-decoders, recurrences | {counts['refused']} | see docs/architectures.md |",
    ]
    before, after = text.split(start)[0], text.split(end)[1]
    readme.write_text(f"{before}{start}\n" + "\n".join(table) + f"\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="only these types, printed as JSON")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    unknown = sorted(set(args.types) - set(causal_types()))
    if unknown:
        parser.error(f"transformers has no causal language model of type {unknown[0]!r}")
    start = time.perf_counter()
    rows = run_all(args.types or causal_types(), args.processes)
    if args.types:
        print(json.dumps(rows, indent=1))
    else:
        write_table(rows, time.perf_counter() - start)
        print(json.dumps(summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
