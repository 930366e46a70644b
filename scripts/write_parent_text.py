"""Lets an autoregressive parent write the text that it is converted on: a conversion without data.

    python scripts/write_parent_text.py SRC --tokens 2000000 --out own.jsonl
    a2d convert SRC --data own.jsonl ...

Owns the sampling of that text and its file, one row for each text: `{"input_ids": [...]}`, read with `a2d data preview
own.jsonl --model SRC`. Text that the parent wrote is, by definition, what the parent knows: nothing is forgotten for
the sake of another corpus, and every token comes from the distribution that is to be kept. Rows hold the very tokens
that were sampled: what was cut off at `--length` does not end with EOS as if it had been finished, and no tokenizer
cuts the words differently. Sampled at temperature 1 and nothing cut off, unless told otherwise.

What is finished is on disk after every batch: a run that was stopped goes on where it was when the same command is
given again, and writes the same bytes as one that was not.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from a2d_hf.atomic_files import write_text
from a2d_hf.errors import A2DError, BadInput
from a2d_hf.journal import Journal


SHORTEST = 2  # tokens of a text that is worth a row, its ends not counted


def start_token(model: Any, tokenizer: Any, named: str | None) -> int:
    """The token that every text begins after: `--start`, or BOS, or EOS where it separates texts as in GPT-2."""
    if named is not None:
        ids = tokenizer.encode(named, add_special_tokens=False)
        if len(ids) != 1:
            raise BadInput(f"--start {named!r} is {len(ids)} tokens of this tokenizer: name one.")
        return ids[0]
    for token in (tokenizer.bos_token_id, model.generation_config.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise BadInput("This tokenizer has neither BOS nor EOS: name the token that texts begin after with --start.")


def texts_of(sampled: list[int], ends: set[int]) -> list[list[int]]:
    """
    The texts of a sampled row: each begins with the row's first token, and ends with the token that ended it, or
    where the row was cut.
    """
    start, *rest = sampled
    texts = [[start]]
    for token in rest:
        texts[-1].append(token)
        if token in ends:
            texts.append([start])
    return [text for text in texts if len([token for token in text if token not in ends]) >= SHORTEST]


def batches(model: Any, tokenizer: Any, args: argparse.Namespace, start: int, first: int) -> Iterator[list[list[int]]]:
    """
    Texts without end, batch by batch, each a pure function of the seed and its number.

    Yields:
        `list[list[int]]`: the texts of a batch, token by token.
    """
    import torch

    ends = {start, tokenizer.eos_token_id}
    # A reserved token, or one that only pads the table, is no text; one of them becomes the mask.
    rows = model.get_output_embeddings().weight.shape[0]
    never = sorted({*tokenizer.all_special_ids, *range(len(tokenizer), rows)} - ends)
    prompt = torch.full((args.batch_size, 1), start, device=model.device)
    for number in itertools.count(first):
        # Torch's generator on a CPU reads the lower 32 bits of a seed only, so both numbers have to be in them.
        torch.manual_seed(random.Random(f"{args.seed} {number}").getrandbits(32))
        sampled = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=0,
            max_new_tokens=args.length - 1,
            pad_token_id=start,
            suppress_tokens=never or None,
        )
        texts = [text for row in sampled.tolist() for text in texts_of(row, ends)]
        if not texts:
            raise BadInput(f"{args.source} ends every text at once when it begins after token {start}: see --start.")
        yield texts


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What must agree for a part that is there to be continued."""
    names = ("source", "batch_size", "length", "temperature", "top_p", "start", "seed")
    return {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> int:
    if args.out.suffix != ".jsonl":
        raise BadInput(f"--out {args.out} must end in .jsonl, which is what is written.")
    if args.out.exists():
        raise BadInput(f"--out {args.out} is there already: name another file.")
    for name in ("tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    if args.temperature <= 0 or not 0 < args.top_p <= 1:
        raise BadInput("--temperature must be positive, and --top-p in (0, 1].")
    part = Path(f"{args.out}.part")

    from transformers import AutoTokenizer

    from a2d_hf.surgery import load_parent

    model = load_parent(Path(args.source)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    longest = model.config.get_text_config().max_position_embeddings
    if not SHORTEST < args.length <= longest:
        raise BadInput(f"--length must lie between {SHORTEST + 1} and the parent's {longest}, not {args.length}.")
    start = start_token(model, tokenizer, args.start)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(part, settings_of(args))
    total = sum(len(text) for batch in journal.records for text in batch["texts"])
    with tqdm(total=args.tokens, initial=min(total, args.tokens), unit="tok", unit_scale=True) as bar:
        source = batches(model, tokenizer, args, start, len(journal.records))
        while total < args.tokens:
            texts = next(source)
            journal.add({"texts": texts})
            tokens = sum(len(text) for text in texts)
            total += tokens
            bar.update(tokens)
    texts = [text for batch in journal.records for text in batch["texts"]]
    write_text(args.out, "".join(json.dumps({"input_ids": text}) + "\n" for text in texts))
    part.unlink()
    print(f"{len(texts):,} texts of {total:,} tokens in {args.out}.")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="folder of an autoregressive checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    parser.add_argument("--tokens", type=int, required=True, help="how many to write, at the least")
    parser.add_argument("--length", type=int, default=512, help="most tokens of a text, BOS included")
    parser.add_argument("--batch-size", type=int, default=64, help="texts at a time")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--start", help="the token that texts begin after; default: BOS, or EOS where there is none")
    parser.add_argument("--seed", type=int, default=0)
    try:
        return run(parser.parse_args(argv))
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        return 130
    except A2DError as error:
        print(f"write_parent_text: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
