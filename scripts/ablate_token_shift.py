"""Does it help to read a prediction one position to the left, as the parent does? The same run, both ways.

    python scripts/ablate_token_shift.py SRC --data D [--max-steps 300 --seeds 0 1]

Owns the measurement behind the default of `token_shift` (docs/decisions.md). Each run is an ordinary `a2d convert`;
the table shows the NELBO per token of held-out text before and after, in nats; the JSON keeps versions and settings.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="folder of an autoregressive checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    args = parser.parse_args()

    import torch
    import transformers

    from a2d_hf import convert

    rows = []
    for token_shift in (False, True):
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                run = convert(
                    args.source,
                    Path(folder) / "run",
                    data=args.data,
                    token_shift=token_shift,
                    seed=seed,
                    max_steps=args.max_steps,
                    max_length=args.max_length,
                    batch_size=args.batch_size,
                )
                results = run.manifest["results"]
            rows.append({"token_shift": token_shift, "seed": seed, "results": results})

    print(f"\n{'token_shift':12} {'NELBO before':>13} {'after':>8} {'seeds':>6}")
    for token_shift in (False, True):
        own = [row["results"] for row in rows if row["token_shift"] == token_shift]
        before, after = (statistics.mean(r[k]["nats_per_token"] for r in own) for k in ("nelbo_before", "nelbo_after"))
        print(f"{token_shift!s:12} {before:13.3f} {after:8.3f} {len(own):6}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"source": Path(args.source).name, "max_steps": args.max_steps, "max_length": args.max_length}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"platform": platform.platform(), "processor": platform.processor() or platform.machine()}
        args.json.write_text(json.dumps(facts | versions | machine | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
