"""`a2d runs`: the runs below a folder."""

import argparse
from pathlib import Path
from typing import Any

from ..console import Console
from ..errors import BadInput
from ..run_directory import RunDirectory, find_runs


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "runs", help="list runs", description="Lists the runs in a folder, up to two levels deep."
    )
    parser.add_argument("root", metavar="ROOT", nargs="?", type=Path, default=Path("runs"), help="folder to look in")
    parser.add_argument("--json", action="store_true", help="print a JSON list on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    console = Console(json_output=args.json)
    if not args.root.is_dir():
        raise BadInput(f"ROOT {args.root} is not a folder: give the folder that holds your runs.")
    rows = [_summary(found) for found in find_runs(args.root)]
    if args.json:
        console.json(rows)
    elif not rows:
        console.line(f"No runs in {args.root}.")
    else:
        console.table(
            ["run", "status", "source", "stage", "created", "NELBO"],
            [[r["path"], r["status"], r["source"], r["stage"], r["created_at"][:16], r["nelbo"]] for r in rows],
        )
    return 0


def _summary(run: RunDirectory) -> dict[str, Any]:
    manifest = run.manifest
    results = manifest.get("results") or {}
    after = results.get("nelbo_after") or results.get("nelbo_before")
    source = manifest.get("source") or {"name": Path((manifest.get("config") or {}).get("source", "?")).name}
    return {
        "path": str(run.path),
        "status": run.status,
        "kind": manifest.get("kind"),
        "source": source["name"],
        "stage": manifest.get("stage"),
        "created_at": manifest["created_at"],
        "nelbo": after["nats_per_token"] if after else None,
        "error": manifest.get("error"),
    }
