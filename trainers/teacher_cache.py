"""A frozen teacher's next-token probabilities on disk: written once, read instead of running it.

Owns what is kept of a row: at each of its tokens but the first, the K tokens that the teacher rated highest there,
their log-probabilities, and that of all the rest together. The folder is a row_cache.py's.

Shapes: B rows, L tokens, T tokens of one row, M tokens of a batch that have one before them, V vocabulary rows, K
tokens kept.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import PreTrainedModel

from a2d_hf.modeling.masked_loss import CHUNK_LOGITS

from .a2d_config import A2DTrainingConfig
from .distillation import plain_head
from .row_cache import RowCache, weights_sha256
from .teachers import FrozenCopy, causal_targets


class TeacherCache(RowCache):
    """A folder of teacher probabilities; its manifest also names `top_k`."""

    manifest_name = "teacher_logits.json"
    what = "teacher cache"
    argument = "teacher_logits_cache"
    script = "scripts/precompute_teacher_logits.py"

    @classmethod
    def of_arguments(cls, model: PreTrainedModel | PeftModel, args: A2DTrainingConfig) -> "TeacherCache | None":
        """The cache that a configuration names, checked against the model before it gets an adapter."""
        if args.teacher_logits_cache is None:
            return None
        if is_peft_model(model):
            raise ValueError(
                "`teacher_logits_cache` belongs to a model without an adapter, and `model` has one: pass the base and "
                '`peft_config`, or use `teacher="adapters_off"`, which needs no memory.'
            )
        return cls.of_model(args.teacher_logits_cache, model)

    def read(self, input_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """
        What the teacher said of a row, at its tokens 1 to T - 1.

        Returns:
            The likeliest tokens `(T - 1, K)`, their log-probabilities `(T - 1, K)` and that of all others together
            `(T - 1,)`, fp32 and summing to 1; `None` where the row is not there.
        """
        found = self.read_row(input_ids, ["top_ids", "top_log_p", "rest_log_p"])
        if found is None:
            return None
        ids, top, rest = found
        # Kept in half precision they do not quite sum to 1.
        whole = torch.cat([top.float(), rest.float()[:, None]], dim=-1).log_softmax(dim=-1)
        return ids.long(), whole[:, :-1], whole[:, -1]


def precompute_teacher_logits(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    folder: str | os.PathLike,
    top_k: int = 64,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    revision: str | None = None,
) -> tuple[int, int]:
    """
    Writes the teacher's probabilities for every row that has none yet.

    Args:
        model ([`A2DForMaskedDiffusion`]): the teacher.
        rows (`Sequence[dict]`): prepared rows, as the trainer will read them.
        folder (`str` or `os.PathLike`): where to; made where it does not exist.
        top_k (`int`): tokens to keep at each position; the whole vocabulary where that is smaller.
        dtype (`torch.dtype`): what log-probabilities are kept in.
        batch_size (`int`): rows per forward pass.
        revision (`str`, *optional*): revision of the teacher; part of the key.

    Returns:
        `tuple[int, int]`: rows written, and rows that were there already.
    """
    if top_k < 1:
        raise ValueError(f"`top_k` must be positive, not {top_k}.")
    top_k = min(top_k, model.get_output_embeddings().weight.shape[0])
    cache = TeacherCache.create(
        folder,
        {
            "model_sha256": weights_sha256(model),
            "revision": revision,
            "dtype": str(dtype).removeprefix("torch."),
            "top_k": top_k,
        },
    )
    teacher = FrozenCopy(model.eval())

    @torch.no_grad()
    def probabilities(inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        targets_BL = causal_targets(inputs["input_ids"], inputs["attention_mask"])
        head_input_MD = teacher(**inputs, labels=targets_BL).head_input
        head, transform = plain_head(model), model.output_head.transform
        kept: dict[str, list[torch.Tensor]] = {"top_ids": [], "top_log_p": [], "rest_log_p": []}
        for hidden_CD in head_input_MD.split(max(1, CHUNK_LOGITS // head.weight.shape[0])):
            logits_CV = transform(torch.nn.functional.linear(hidden_CD, head.weight, head.bias))[0]
            log_p_CV = logits_CV.float().log_softmax(dim=-1)
            top = log_p_CV.topk(top_k, dim=-1)
            rest_C = log_p_CV.scatter(1, top.indices, -torch.inf).logsumexp(dim=-1)
            kept["top_ids"].append(top.indices.to("cpu", torch.int32))
            kept["top_log_p"].append(top.values.to("cpu", dtype))
            kept["rest_log_p"].append(rest_C.to("cpu", dtype))
        counts = (targets_BL != -100).sum(dim=-1).tolist()
        by_row = {name: torch.cat(parts).split(counts) for name, parts in kept.items()}
        for b in range(len(counts)):
            yield {name: parts[b] for name, parts in by_row.items()}

    return cache.fill(rows, probabilities, batch_size, next(model.parameters()).device)
