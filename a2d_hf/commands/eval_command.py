"""`a2d eval`: what a conversion cost and what it bought. evaluation_run.py measures, evaluation_report.py draws."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import Console
from ..conversion_settings import DEVICES
from ..errors import BadInput, Interrupted


if TYPE_CHECKING:
    from ..evaluation_run import Evaluation


LIKELIHOODS = ("nelbo", "token_by_token", "causal")
NOT_SETTINGS = ("command", "path", "run", "json", "html", "out")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a converted model on held-out text, beside its parent",
        description="Measures the NELBO per token (an upper bound on the negative log-likelihood) with its standard "
        "error, the parent's NLL on the same tokens, how many masked tokens one forward pass gets right, and how many "
        "gaps are filled exactly; writes some samples. --sweep adds speed against quality, --tasks adds lm-eval "
        "tasks, --against adds a second model: these take longer. Writes report.json, timings.json and report.html "
        "into RUN/eval. Interrupted, the same command goes on from the parts that are finished.",
    )
    parser.add_argument("path", metavar="RUN", help="run directory, or folder of a converted checkpoint")
    parser.add_argument("--data", metavar="D", help="text to measure on (default: what the run held out)")
    parser.add_argument("--parent", metavar="SRC", help="folder of the parent (default: where the run found it)")
    parser.add_argument("--against", metavar="OTHER", help="a second run, measured on the same text beside the first")
    parser.add_argument("--mc-samples", type=int, default=8, metavar="N", help="masks drawn per row")
    parser.add_argument("--max-tokens", type=int, default=65536, metavar="N", help="most tokens to measure on")
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens per row (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per forward pass")
    parser.add_argument(
        "--infill-spans", type=int, default=64, metavar="N", help="gaps of each length to fill; 0 for none"
    )
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="texts to write; 0 for none")
    parser.add_argument("--sweep", action="store_true", help="also measure speed against quality, and the AUP")
    parser.add_argument("--tasks", metavar="T1,T2", help="lm-eval tasks to run on the model and on its parent")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="most examples per task")
    parser.add_argument("--num-fewshot", type=int, metavar="K", help="examples before each question")
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="nelbo", help="how tasks are scored")
    parser.add_argument("--mc-num", type=int, default=128, metavar="N", help="masks per answer of a task")
    parser.add_argument("--seed", type=int, default=0, help="decides masks, gaps and samples")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a parent that needs its own code")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier call has measured")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: RUN/eval)")
    parser.add_argument(
        "--html", action=argparse.BooleanOptionalAction, default=True, help="write the page report.html (the default)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..converted_model import find_converted
    from ..evaluation_report import write_evaluation_page
    from ..evaluation_run import EvaluationSettings, evaluate_run, report_folder

    chosen = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    chosen["tasks"] = ()
    settings = EvaluationSettings(**chosen)
    found = find_converted(args.path)
    if args.tasks is not None:
        from ..task_scores import task_names

        settings = EvaluationSettings(**chosen | {"tasks": tuple(task_names(args.tasks, args.include_path))})
    elif args.include_path is not None or args.limit is not None or args.num_fewshot is not None:
        raise BadInput("--include-path, --limit and --num-fewshot belong to --tasks: name the tasks.")
    console = Console(json_output=args.json)
    folder = report_folder(found, args.out)
    try:
        evaluation = evaluate_run(found, folder, settings, console)
    except KeyboardInterrupt as stop:
        kept = "" if folder is None else "; finished parts are kept, and the same command goes on from there"
        raise Interrupted(f"interrupted{kept}.") from stop
    if args.html and folder is not None:
        write_evaluation_page(folder / "report.html", evaluation, found.run, command_of(args))
    if console.json_output:
        console.json(evaluation.report)
        return 0
    _show(evaluation, console)
    if folder is not None:
        names = "report.json, timings.json" + (" and report.html" if args.html else "")
        console.note(f"written to {folder}: {names}")
        if evaluation.reused:
            count = len(evaluation.reused)
            console.note(f"{count} finished parts of an earlier call were used (--fresh measures them again)")
    return 0


def command_of(args: argparse.Namespace) -> str:
    """The command that measures the same again, with every flag that decides a number."""
    words = ["a2d", "eval", str(args.path)]
    for name, value in vars(args).items():
        if name in NOT_SETTINGS or name == "fresh" or value is None or value is False:
            continue
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


def _show(evaluation: "Evaluation", console: Console) -> None:
    report = evaluation.report
    nelbo, parent, against = report["nelbo"], report["parent"], report["against"]
    rows = [["conversion, NELBO (upper bound)", nelbo["nats_per_token"], nelbo["standard_error"], nelbo["tokens"]]]
    if parent["available"]:
        nll = parent["nll"]
        rows.append([f"parent {parent['name']}, NLL", nll["nats_per_token"], nll["standard_error"], nll["tokens"]])
    if against is not None:
        for label, value in ((f"{against['model']}, NELBO", against["nelbo"]),
                             (f"{against['model']} - {report['model']}, paired", against["difference"])):  # fmt: skip
            rows.append([label, value["nats_per_token"], value["standard_error"], value["tokens"]])
    console.table([f"text: {report['text']['name']}", "nats/token", "± s.e.", "tokens"], rows)
    if not parent["available"]:
        console.note(f"parent: unavailable, {parent['reason']}")
    for note in [] if against is None else against["notes"]:
        console.warn(note)
    console.line()
    console.table(
        ["masked", "predicted exactly by one forward", "tokens"],
        [[f"{row['ratio']:.0%}", f"{row['accuracy']:.1%}", row["tokens"]] for row in report["masked_accuracy"]],
    )
    _show_infilling(report["infilling"], console)
    if report["throughput"] is not None:
        _show_throughput(report["throughput"], evaluation.timings, console)
    if report["tasks"]:
        console.line()
        console.table(
            ["task", "metric", "conversion", "± s.e.", "parent", "± s.e."],
            [
                [line[name] for name in ("task", "metric", "value", "stderr", "parent_value", "parent_stderr")]
                for line in report["tasks"]
            ],
        )
    for curve in report["task_curves"]:
        _show_task_curve(curve, console)
    console.line()


def _show_infilling(table: list[dict[str, Any]], console: Console) -> None:
    lines = []
    for line in table:
        if not line["spans"]:
            continue
        parent = line["parent"]
        lines.append(
            [line["length"], f"{line['token_accuracy']:.1%}", f"{line['span_accuracy']:.1%}"]
            + ["-" if parent is None else f"{parent['token_accuracy']:.1%}", line["spans"]]
        )
    if lines:
        console.line()
        console.table(["gap", "tokens right", "gaps right", "parent's tokens, from the left only", "gaps"], lines)


def _show_throughput(throughput: dict[str, Any], timings: dict[str, Any], console: Console) -> None:
    lines = [
        [point["name"], point["tokens_per_forward"], round(clock["tokens_per_second"]), point.get("parent_nll")]
        for point, clock in zip(throughput["points"], timings["throughput"], strict=True)
    ]
    if throughput["parent"] is not None:
        clock, beside = timings["parent_throughput"], throughput["parent"]
        lines.append(["the parent's generate", 1.0, round(clock["tokens_per_second"]), beside["parent_nll"]])
    console.line()
    console.table(["writing", "tokens/forward", "tokens/s", "parent's NLL of it"], lines)
    if throughput["aup"] is not None:
        console.note(f"AUP of filling gaps of {throughput['infilling_curve'][0]['length']}: {throughput['aup']:.1f}")


def _show_task_curve(curve: dict[str, Any], console: Console) -> None:
    lines = [[point[name] for name in ("name", "tokens_per_forward", "value", "stderr")] for point in curve["points"]]
    if curve["parent_value"] is not None:
        lines.append(["the parent", 1.0, curve["parent_value"], curve["parent_stderr"]])
    console.line()
    console.table([curve["task"], "tokens/forward", curve["metric"], "± s.e."], lines)
    areas = ", ".join(f"{way} {area:.1f}" for way, area in curve["aup"].items())
    console.note(f"AUP of {curve['task']}: {areas}")
