"""What a block diffusion model makes of the text around a gap: its cross-entropy for every set of masks in a block.

    python scripts/block_context.py RUN --data D

Owns the table, printed in Markdown. A model that has learned to look to the right is surer of a token the more of the
block stands behind it; a column of equal numbers says that it still writes from left to right. Reads a converted
checkpoint and a text, writes nothing. Measured on the end of the text, as much as `--tokens` says.
"""

import argparse
import itertools
import math
import sys

import torch

from a2d_hf.converted_model import find_converted
from a2d_hf.data import read_rows
from a2d_hf.errors import A2DError, BadInput
from a2d_hf.modeling.attention_pattern import AttentionPattern
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion


LARGEST_BLOCK = 6  # 63 sets of masks


def cross_entropies(model: A2DForMaskedDiffusion, ids_L: torch.Tensor) -> dict[tuple[int, ...], dict[int, float]]:
    """
    Mean cross-entropy of each masked token, by the places that are masked in every block and its own place there.

    Args:
        model ([`A2DForMaskedDiffusion`]): of the objective `bd3lm`.
        ids_L (`torch.LongTensor` of shape `(L,)`): a text of whole blocks.
    """
    size, length, found = model.config.block_size, ids_L.shape[0], {}
    pattern = AttentionPattern.bd3lm(size, clean_context=model.config.clean_context)
    for count in range(1, size + 1):
        for masked in itertools.combinations(range(size), count):
            noisy_L = ids_L.clone()
            for place in masked:
                noisy_L[place::size] = model.config.mask_token_id
            with torch.no_grad():
                logits_LV = model(input_ids=torch.cat([noisy_L, ids_L])[None], attention_pattern=pattern).logits[0]
            log_p_LV = logits_LV[:length].float().log_softmax(dim=-1)
            # The first token of a text is predicted from nothing, by a shifted model not at all.
            asked = {place: torch.arange(place or size, length, size, device=ids_L.device) for place in masked}
            found[masked] = {place: -log_p_LV[at, ids_L[at]].mean().item() for place, at in asked.items()}
    return found


def nelbo(found: dict[tuple[int, ...], dict[int, float]], size: int) -> float:
    """The NELBO per token that the table amounts to: k uniform on 1 to n, n / k each, over the sets of k masks."""
    of_sets = (sum(ce.values()) / len(masked) / math.comb(size, len(masked)) for masked, ce in found.items())
    return sum(of_sets) / size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a converted BD3LM checkpoint with a small block")
    parser.add_argument("--data", required=True, help="text, of which the end is read")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a row")
    args = parser.parse_args()
    try:
        model, tokenizer = find_converted(args.run).load()
        size = model.config.block_size
        if model.config.objective != "bd3lm" or not 2 <= size <= LARGEST_BLOCK:
            raise BadInput(f"RUN {args.run} is no BD3LM checkpoint with blocks of 2 to {LARGEST_BLOCK} tokens.")
        text = "\n".join(row["text"] for row in read_rows(args.data).rows if "text" in row)
    except A2DError as error:
        print(f"block_context: error: {error}", file=sys.stderr)
        return error.exit_code
    length = args.max_length // size * size
    ids = tokenizer(text[-args.tokens * 8 :], add_special_tokens=False).input_ids[-args.tokens // length * length :]
    rows = torch.tensor(ids[: len(ids) // length * length], device=model.device).view(-1, length)
    tables = [cross_entropies(model, row_L) for row_L in rows]
    mean = {
        masked: {place: sum(table[masked][place] for table in tables) / len(tables) for place in masked}
        for masked in tables[0]
    }
    print(f"| masked | {' | '.join(f'token {place + 1}' for place in range(size))} |")
    print("|---" * (size + 1) + "|")
    for masked, ce in mean.items():
        shown = "".join("█" if place in masked else "░" for place in range(size))
        print(f"| {shown} | {' | '.join(f'{ce[place]:.2f}' if place in ce else '' for place in range(size))} |")
    print(f"\nNELBO {nelbo(mean, size):.3f} nats per token over {rows.numel():,} tokens.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
