"""What helps a conversion: held-out NELBO against tokens trained for, arm by arm, each at its own best learning rate.

    python scripts/bench_conversion.py SRC --data D --json benchmarks/conversion_X.json --figure docs/conversion_X.svg

Owns the measurement behind the defaults of training (docs/decisions.md, docs/conversion.md). Every arm gets the same
rows, the same tokens and the same evaluation: a learning rate is chosen on the first seed among three, the other seeds
run at it. A finished run is in the JSON at once, so an interrupted measurement continues where it was.

The NELBO is the trainer's own, per token of the held-out text: of a global canvas for MDLM, of a block given the clean
blocks before it for BD3LM. Both bound the NLL of the same text, which is what makes them comparable with the parent's.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from conversion_arms import ARMS, LEARNING_RATES, Arm
from conversion_runs import Budget, one_run, prepared_rows, scored_rows


def parent_nll(args: argparse.Namespace) -> dict[str, Any]:
    """The parent's NLL on the held-out rows, from left to right."""
    from a2d_hf import evaluate
    from a2d_hf.surgery import load_parent

    _, held_out = prepared_rows(args.source, args.data, args.max_length, args.held_out_tokens, False)
    parent = load_parent(Path(args.source))
    return evaluate.autoregressive_nll(parent, scored_rows(held_out)).to_dict()


def measured(job: tuple[Arm, argparse.Namespace, Budget, float, int]) -> dict[str, Any]:
    """[`one_run`] in a process of its own: one thread, no bars, and what is to be kept of it."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arm, args, budget, learning_rate, seed = job
    found = one_run(arm, args, budget, learning_rate, seed)
    return {"arm": arm.name, "learning_rate": learning_rate, "seed": seed, **found}


class Results:
    """Finished runs, on disk as soon as they are."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts, self.runs = path, facts, []
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            facts["own_text"] = facts["own_text"] or kept.get("own_text")  # asked for by some arms only
            compared = ("source", "data", "budget") + (("own_text",) if kept.get("own_text") else ())
            differing = [name for name in compared if kept.get(name) != facts[name]]
            if differing:
                raise SystemExit(f"--json {path} holds a measurement with another {differing[0]}: name another file.")
            self.runs = kept["runs"]

    def find(self, arm: str, learning_rate: float, seed: int) -> dict[str, Any] | None:
        key = (arm, learning_rate, seed)
        return next((run for run in self.runs if (run["arm"], run["learning_rate"], run["seed"]) == key), None)

    def add(self, **run: Any) -> dict[str, Any]:
        from a2d_hf.atomic_files import write_json

        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.facts | {"runs": self.runs})
        return run


def final(run: dict[str, Any]) -> float:
    """The NELBO at the end of a run; a diverged one counts as infinitely bad."""
    value = run["curve"][-1][1]
    return value if math.isfinite(value) else math.inf


def summary(results: Results, arms: list[Arm]) -> list[dict[str, Any]]:
    """One row per arm, in order: its best learning rate, and mean and spread over the seeds that ran at it."""
    rows = []
    for arm in arms:
        own = [run for run in results.runs if run["arm"] == arm.name]
        if not own:
            continue
        first = [run for run in own if run["seed"] == min(r["seed"] for r in own)]
        best = min(first, key=final)["learning_rate"]
        chosen = [run for run in own if run["learning_rate"] == best]
        finals = [final(run) for run in chosen]
        steps = zip(*(run["curve"] for run in chosen), strict=True)
        curve = [(points[0][0], [nelbo for _, nelbo in points]) for points in steps]
        rows.append(
            {
                "arm": arm.name,
                "learning_rate": best,
                "seeds": len(chosen),
                "before": statistics.mean(curve[0][1]),
                "after": statistics.mean(finals),
                "spread": statistics.stdev(finals) if len(finals) > 1 else 0.0,
                "exact": [run["exact"]["nats_per_token"] for run in chosen if run.get("exact")],
                "curve": [(tokens, statistics.mean(values)) for tokens, values in curve],
                "seconds": statistics.mean(run["seconds"] for run in chosen),
            }
        )
    return rows


def tokens_to_reach(curve: list[tuple[int, float]], nelbo: float) -> float | None:
    """Tokens after which a curve is at `nelbo` or below, between two points by a straight line; `None` if never."""
    for (tokens, above), (later, below) in zip(curve, curve[1:], strict=False):
        if below <= nelbo:
            share = (above - nelbo) / (above - below) if above > nelbo else 0.0
            return tokens + share * (later - tokens)
    return None


def show(rows: list[dict[str, Any]], parent: float) -> None:
    """Prints the table in Markdown."""
    plain = next((row for row in rows if row["arm"] == ARMS[0].name), None)
    print("\n| arm | learning rate | NELBO before | after | ± over seeds | tokens to plain MDLM's end | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        reach = tokens_to_reach(row["curve"], plain["after"]) if plain else None
        share = "–" if reach is None else f"{reach / row['curve'][-1][0]:.0%}"
        print(
            f"| {row['arm']} | {row['learning_rate']:g} | {row['before']:.3f} | {row['after']:.3f} | "
            f"{row['spread']:.3f} ({row['seeds']}) | {share} | {row['seconds']:.0f} |"
        )
    print(f"\nThe parent's NLL on the same text: {parent:.3f}.")
    for row in (row for row in rows if row["exact"]):
        found = statistics.mean(row["exact"])
        print(f"{row['arm']}, over every set of masks: {found:.3f}, {found - parent:.3f} above the parent.")


def draw(rows: list[dict[str, Any]], parent: float, path: Path) -> None:
    """NELBO against tokens: a whole canvas, blocks, and the second half of the blocks that start best."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "a2d_hf"  # the same numbers give the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), constrained_layout=True)
    axes[1].sharey(axes[0])
    close_up = ("shifted blocks of 4, close up", "BD3LM 4, shift", 2)
    panels = (("whole canvas", "MDLM", 0), ("blocks", "BD3LM", 0), close_up)
    for axis, (title, prefix, first) in zip(axes, panels, strict=True):
        for row in (row for row in rows if row["arm"].startswith(prefix)):
            curve = row["curve"][first:]
            tokens = [t / 1e6 for t, _ in curve]
            axis.plot(tokens, [n for _, n in curve], label=f"{row['arm']}: {row['after']:.2f}")
            axis.errorbar(tokens[-1], row["after"], yerr=row["spread"], color=axis.lines[-1].get_color(), capsize=2)
        if first == 0:
            axis.axhline(parent, color="black", linestyle=":", label=f"the AR parent's NLL: {parent:.2f}")
        axis.set(title=title, xlabel="million tokens trained for")
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("held-out NELBO, nats per token")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def measure_all(args: argparse.Namespace, arms: list[Arm], budget: Budget, results: Results) -> None:
    """
    The first seed of every arm at every rate, then the other seeds at the best: an early stop leaves a whole table.
    What is measured already is not measured again.
    """
    rates = {arm.name: args.learning_rates or LEARNING_RATES[arm.objective] for arm in arms}
    first = [(arm, rate, args.seeds[0]) for arm in arms for rate in rates[arm.name]]
    total, done = len(first) + len(arms) * (len(args.seeds) - 1), 0
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:

        def measure(cells: list[tuple[Arm, float, int]]) -> None:
            nonlocal done
            missing = [cell for cell in cells if results.find(cell[0].name, *cell[1:]) is None]
            done += len(cells) - len(missing)
            futures = [pool.submit(measured, (arm, args, budget, rate, seed)) for arm, rate, seed in missing]
            for future in as_completed(futures):
                run = results.add(**future.result())
                done += 1
                arm, rate, seed, before = run["arm"], run["learning_rate"], run["seed"], run["curve"][0][1]
                print(f"{done}/{total}  {arm}, {rate:g}, seed {seed}: {before:.3f} to {final(run):.3f}", flush=True)

        measure(first)
        best = {row["arm"]: row["learning_rate"] for row in summary(results, arms)}
        measure([(arm, best[arm.name], seed) for seed in args.seeds[1:] for arm in arms])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="folder of an autoregressive checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--own-text", help="what write_parent_text.py has written, for the arms that train on it")
    parser.add_argument("--tokens", type=int, default=196_608, help="trained for in every run")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--points", type=int, default=4, help="measurements along a run")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="default: three by objective")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="default: all of them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are, and are kept")
    parser.add_argument(
        "--models", type=Path, help="folder to keep the trained models in; by default they are not kept"
    )
    parser.add_argument("--figure", type=Path, help="SVG to draw (needs matplotlib)")
    parser.add_argument("--show", action="store_true", help="only table and figure of what is there")
    args = parser.parse_args()

    from a2d_hf.provenance import hardware, library_versions

    budget = Budget(args.tokens, args.max_length, args.batch_size, args.points)
    facts = {
        "source": Path(args.source).name,
        "data": Path(args.data).name,
        "own_text": args.own_text and Path(args.own_text).name,
        "budget": vars(budget) | {"held_out_tokens": args.held_out_tokens},
        "versions": library_versions(),
        "machine": hardware(),
        "parent_nll": parent_nll(args),
    }
    results = Results(args.json, facts)
    wanted = args.arms or [arm.name for arm in ARMS if args.show or args.own_text or not arm.own_text]
    arms = [arm for arm in ARMS if arm.name in wanted]
    if args.own_text is None and any(arm.own_text for arm in arms) and not args.show:
        parser.error("--own-text is missing: write it with scripts/write_parent_text.py.")
    if not args.show:
        measure_all(args, arms, budget, results)
    rows = summary(results, arms)
    show(rows, facts["parent_nll"]["nats_per_token"])
    if args.figure is not None:
        draw(rows, facts["parent_nll"]["nats_per_token"], args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
