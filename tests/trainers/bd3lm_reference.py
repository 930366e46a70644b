"""Block diffusion once more, block by block: the independent side of the comparisons.

Every block is one pass of the PARENT, over `[clean text before the block ; noisy block]`, with a mask written out edge
by edge: no doubled sequence, no attention pattern of ours, no gathered rows.
"""

import torch

from tests.trainers import reference_noise
from tests.trainers.helpers import MASK_ID


SILVER = 0x6A09E667F3BCC909


def time(seed, epoch, place, block, minimum, maximum) -> float:
    fraction = (reference_noise.bits(reference_noise.TIME_OFFSET, seed, epoch) << 11) & reference_noise.WORD
    fraction = (fraction + place * reference_noise.GOLDEN + block * SILVER) & reference_noise.WORD
    return minimum + (maximum - minimum) * (fraction >> 11) / 2**53


def block_logits(parent, clean, noisy, start, block_size, clean_context):
    """Logits of `[clean[:start] ; noisy]`, the parent's raw ones, `(start + len(noisy), V)`."""
    length = start + len(noisy)
    mask = torch.full((length, length), torch.finfo(torch.float32).min)
    for q in range(length):
        for k in range(length):
            if q >= start:
                seen = True  # the noisy block sees itself and all clean text before it
            elif clean_context == "causal":
                seen = k <= q
            else:
                seen = k < start and k // block_size <= q // block_size
            if seen:
                mask[q, k] = 0.0
    ids = torch.cat([clean[:start], noisy])[None]
    position_ids = torch.arange(length)[None]
    return parent(input_ids=ids, attention_mask=mask[None, None], position_ids=position_ids, use_cache=False).logits[0]


def token_losses(model, clean, hidden, start, block_size, clean_context="block", token_shift=False):
    """Cross-entropies of the tokens at the positions `hidden` of the block that begins at `start`, by position."""
    noisy = clean[start : start + block_size].clone()
    noisy[[i - start for i in hidden]] = MASK_ID
    logits = block_logits(model.backbone, clean, noisy, start, block_size, clean_context)
    read = {i: i - 1 if token_shift else i for i in hidden}
    return {i: -logits[read[i]].log_softmax(-1)[clean[i]] for i in hidden}


def counted_views(seed, epoch, row, place, block, targets, complementary):
    """Of n targets the k with the lowest bits, k by the block's fraction of 1 to n (of 0 to n for two views)."""
    n, lowest = len(targets), 0 if complementary else 1
    k = lowest + int(time(seed, epoch, place, block, 0.0, 1.0) * (n + 1 - lowest))
    by_bits = sorted(targets, key=lambda i: reference_noise.bits(reference_noise.TOKEN_MASK, seed, epoch, row, i))
    hidden, others = sorted(by_bits[:k]), sorted(by_bits[k:])
    if not complementary:
        return [(hidden, n / k)]
    return [(set_, (n + 1) / len(set_)) for set_ in (hidden, others) if set_]


def nested_views(seed, epoch, row, place, block, targets, count, orders=1):
    """`count` views, each with a k from its own part of 1 to n, hiding the k targets with the lowest bits; and again
    for each further order, in which every target moves up by one and the first becomes the last."""
    n, fraction = len(targets), time(seed, epoch, place, block, 0.0, 1.0)
    by_bits = sorted(targets, key=lambda i: reference_noise.bits(reference_noise.TOKEN_MASK, seed, epoch, row, i))
    counts = [1 + int((view + fraction) / count * n) for view in range(count)]
    by_order = [by_bits[n - o % n :] + by_bits[: n - o % n] for o in range(orders)] if n else []
    return [(sorted(in_order[:k]), n / k) for in_order in by_order for k in counts]


def loss(run, batch, schedule="linear", minimum=1e-3, maximum=1.0, complementary=False):
    """The loss of a batch in training; packed rows have `document_ids`, the number of each in the batch."""
    config, seed = run.diffusion_config, run.args.seed
    size, total, items = config.block_size, torch.zeros(()), 0
    for b in range(batch["input_ids"].shape[0]):
        real = batch["attention_mask"][b].bool()
        row_ids, row_labels = batch["input_ids"][b][real], batch["labels"][b][real]
        documents = batch["document_ids"][b][real] if "document_ids" in batch else torch.full_like(row_ids, b)
        for document in documents.unique_consecutive():
            row, epoch, place = (int(batch[name][document]) for name in ("row_id", "epoch", "place"))
            ids, labels = row_ids[documents == document], row_labels[documents == document]
            for block, start in enumerate(range(0, len(ids), size)):
                t = time(seed, epoch, place, block, minimum, maximum)
                share = reference_noise.mask_share(t, schedule)
                targets = [i for i in range(start, min(start + size, len(ids))) if labels[i] != -100]
                hidden = [i for i in targets if reference_noise.is_masked(seed, epoch, row, i, share)]
                views = [(hidden, reference_noise.weight(t, schedule, minimum))]
                if complementary:
                    views.append(([i for i in targets if i not in hidden], 1 / (1 - t)))
                if run.args.mask_sampling == "count":
                    views = counted_views(seed, epoch, row, place, block, targets, complementary) if targets else []
                if run.args.nested_views * run.args.nested_orders > 1:
                    nested = run.args.nested_views, run.args.nested_orders
                    views = nested_views(seed, epoch, row, place, block, targets, *nested)
                for positions, weight in views:
                    found = token_losses(
                        run.model, ids, positions, start, size, config.clean_context, config.token_shift
                    )
                    repeats = max(1 + complementary, run.args.nested_views * run.args.nested_orders)
                    total = total + weight / repeats * sum(found.values())
                items = items + len(targets)
    return total / items
