"""Takes the autoregressive model back out of a conversion, as one that transformers reads without this library.

    python scripts/save_causal_lm.py RUN OUT

Owns the way back: the parent's class with the weights of the conversion, without the rows that were added for the mask
token. What comes out is as good from left to right as the conversion is in its causal mode: exact after blocks of one
token with `token_shift`, which is plain fine-tuning of the parent, or where `ar_loss_weight` kept it. It can be the
parent of another conversion: the tokenizer still knows the mask token, for which the model then grows a row again.
"""

import argparse
import sys
from pathlib import Path

from a2d_hf.atomic_files import replaced_folder
from a2d_hf.converted_model import find_converted
from a2d_hf.errors import A2DError, BadInput


def run(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise BadInput(f"OUT {args.out} is there already: name another folder.")
    found = find_converted(args.run)

    from transformers.utils import logging

    logging.set_verbosity_error()
    model, tokenizer = found.load("cpu")
    parent, rows = model.backbone, model.config.parent_vocab_size
    if parent.get_input_embeddings().weight.shape[0] != rows:
        parent.resize_token_embeddings(rows, mean_resizing=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(args.out) as folder:
        parent.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{type(parent).__name__} with {parent.num_parameters():,} parameters in {args.out}.")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run directory, or folder of a converted checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    try:
        return run(parser.parse_args(argv))
    except A2DError as error:
        print(f"save_causal_lm: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
