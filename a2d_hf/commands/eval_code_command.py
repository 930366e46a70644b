"""`a2d eval-code`: programs written by a converted model, and the share of them that pass their tests."""

import argparse
from pathlib import Path

from ..atomic_files import explained_writes, write_json
from ..code_tasks import TASKS
from ..console import Console
from ..conversion_settings import DEVICES
from ..errors import BadInput


KS = (1, 10, 100)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "eval-code",
        help="let a converted model write programs, and test them",
        description="Writes programs for HumanEval, MBPP or HumanEval-infilling, keeps each as soon as it is written, "
        "and with --allow-code-execution runs them under limits of time, memory, file size and processes. That is no "
        "sandbox: what the model wrote has the rights of whoever runs this command.",
    )
    parser.add_argument("path", metavar="RUN", help="run directory, or folder of a converted checkpoint")
    parser.add_argument("--task", required=True, choices=TASKS, help="which problems they are")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="the problems, .jsonl or .jsonl.gz")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: RUN/eval/TASK)")
    parser.add_argument("--allow-code-execution", action="store_true", help="run what the model wrote")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="programs per problem, for pass@k up to N")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of a program")
    parser.add_argument("--steps", type=int, metavar="N", help="forward passes (default: one per token)")
    parser.add_argument("--block-size", type=int, metavar="N", help="finish this many positions before the next ones")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="seconds that a program may take")
    parser.add_argument("--memory-mb", type=int, default=1024, metavar="N", help="megabytes that a program may take")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where the model runs")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a parent that needs its own code")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    for flag, value in (
        ("--samples", args.samples),
        ("--max-new-tokens", args.max_new_tokens),
        ("--limit", 1 if args.limit is None else args.limit),
        ("--timeout", args.timeout),
        ("--memory-mb", args.memory_mb),
    ):
        if value <= 0:
            raise BadInput(f"{flag} must be above 0, not {value}.")
    if args.samples > 1 and args.temperature == 0:
        raise BadInput(f"--samples {args.samples} would all be the same: give --temperature above 0.")
    from ..code_execution import Limits
    from ..code_tasks import Generations, exact_match, read_problems, score, write_program
    from ..converted_model import find_converted, resolve_device
    from ..local_metrics import check_installed
    from ..source import file_sha256

    infilling = args.task == "humaneval-infilling"
    for metric, wanted in (("code_eval", args.allow_code_execution), ("exact_match", infilling)):
        if wanted:
            check_installed(metric)

    problems = read_problems(args.task, args.data)[: args.limit]
    found = find_converted(args.path)
    out = args.out or (found.run.eval_path / args.task if found.run is not None else None)
    if out is None:
        raise BadInput(f"RUN {args.path} is a plain checkpoint: say with --out where its results go.")
    console = Console(json_output=args.json)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "steps": args.steps,
        "block_size": args.block_size,
        "temperature": args.temperature,
    }
    options = {name: value for name, value in options.items() if value is not None}
    weights = sorted(found.path.glob("*.safetensors"))
    settings = {
        "task": args.task,
        "data": file_sha256(args.data),
        "model": [file_sha256(file) for file in weights],
        "samples": args.samples,
        "seed": args.seed,
        "decoding": options,
    }
    with explained_writes(out):
        out.mkdir(parents=True, exist_ok=True)
    kept = Generations(out / "generations.jsonl", settings)
    left = [problem for problem in problems if problem.name not in kept.done]
    if left:
        model, tokenizer = found.load(resolve_device(args.device), args.trust_remote_code)
        with console.progress("programs", len(problems), "problem", done=len(problems) - len(left)) as bar:
            for problem in left:
                texts = [
                    write_program(model, tokenizer, problem, options | {"seed": args.seed + number})
                    for number in range(args.samples)
                ]
                kept.add(problem.name, texts)
                bar.advance()
    report = {
        "schema_version": 1,
        **settings,
        "problems": len(problems),
        "executed": args.allow_code_execution,
        "length": "given" if infilling else "written by the model",
        "exact_match": exact_match(problems, kept.done) if infilling else None,
        "pass_at_k": None,
        "results": None,
    }
    if args.allow_code_execution:
        ks = [k for k in KS if k <= args.samples]
        limits = Limits(seconds=args.timeout, memory_mb=args.memory_mb)
        with console.progress("tests", len(problems) * args.samples, "program") as bar:
            report["pass_at_k"], report["results"] = score(problems, kept.done, ks, limits, bar.advance)
        report["limits"] = {"seconds": limits.seconds, "memory_mb": limits.memory_mb, "file_mb": limits.file_mb}
    write_json(out / "report.json", report)
    if args.json:
        console.json(report)
    else:
        lines = list((report["pass_at_k"] or {}).items())
        if infilling:
            lines.append(("exact_match", report["exact_match"]))
        if lines:
            console.table(["measure", "share of problems"], lines)
        if report["pass_at_k"] is None:
            console.note("not run: add --allow-code-execution to test what the model wrote")
    console.note(f"written to {out}")
    return 0
