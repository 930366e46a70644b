"""A row as the work of several steps: each trains on a stretch of its blocks, with the text before it as context.

Owns the cut of prepared rows into shares. In block diffusion a block sees clean text before it and nothing behind it,
so that a share is its row as far as its last target, less the targets of the shares before: what is asked for each
token and what is known of it stay the same, and so does the objective over all shares together.
"""

from typing import Any

import datasets


def in_shares(row: dict[str, Any], shares: int, block_size: int) -> list[dict[str, Any]]:
    """
    Cuts a row.

    Args:
        row (`dict`): a prepared row: `input_ids`, `labels` and whatever else, which every share gets as it is.
        shares (`int`): how many; fewer where fewer blocks have a target.
        block_size (`int`): tokens per block.

    Returns:
        `list[dict]`: the shares, in the order of the row. Every target is in exactly one of them.
    """
    labels = row["labels"]
    blocks = sorted({i // block_size for i, label in enumerate(labels) if label != -100})
    shares = max(1, min(shares, len(blocks)))
    cut, first = [], 0
    for share in range(shares):
        last_block = blocks[len(blocks) * (share + 1) // shares - 1] if blocks else 0
        end = len(labels) if share == shares - 1 else (last_block + 1) * block_size
        own = [-100] * first + list(labels[first:end])
        cut.append({**row, "input_ids": list(row["input_ids"][:end]), "labels": own})
        first = end
    return cut


def dataset_in_shares(
    dataset: datasets.Dataset | datasets.IterableDataset, shares: int, block_size: int, num_proc: int | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Cuts every row of a prepared dataset; shares of a row stand one behind the other.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): prepared rows.
        shares, block_size: as in [`in_shares`].
        num_proc (`int`, *optional*): processes, of a dataset with a length.

    Returns:
        A dataset of the same kind.
    """

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = [share for row in rows for share in in_shares(row, shares, block_size)]
        return {name: [share[name] for share in found] for name in batch}

    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(cut, batched=True)
    return dataset.map(cut, batched=True, num_proc=num_proc, desc=f"Cutting rows into {shares} shares")
