"""How fast a model writes, and what the speed costs: forward passes saved against quality, the AR parent beside it.

Owns the settings that are swept and the clock. Times are this machine's and are kept apart from the texts, which are
the same at every call (greedy decoding).

Shapes: B prompts, P tokens of a prompt, N new tokens.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .modeling.modeling_a2d import A2DForMaskedDiffusion


SHARES = (1.0, 0.5, 0.25, 0.125)  # forward passes per new token
THRESHOLDS = (0.9, 0.7, 0.5)
REPEATS = 2  # the faster one counts: a machine is only ever slowed down by others


def settings(new_tokens: int) -> list[dict[str, Any]]:
    """What is swept: arguments of `diffusion_generate`, from the slowest to the fastest."""
    steps = dict.fromkeys(max(1, round(new_tokens * share)) for share in SHARES)
    return [{"steps": count} for count in steps] + [{"selector": "threshold", "threshold": t} for t in THRESHOLDS]


def setting_name(setting: dict[str, Any]) -> str:
    """A setting as a person says it."""
    if "threshold" in setting:
        return f"threshold {setting['threshold']:g}"
    return f"{setting['steps']} step{'' if setting['steps'] == 1 else 's'}"


def sweep(
    model: A2DForMaskedDiffusion,
    prompts_BP: torch.Tensor,
    new_tokens: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Writes `new_tokens` behind every prompt at each setting, all prompts in one call, ends of text left out so that
    every call writes as much.

    Args:
        model ([`A2DForMaskedDiffusion`]): what writes.
        prompts_BP (`torch.LongTensor` of shape `(B, P)`): prompts of one length.
        new_tokens (`int`): N.
        advance (`Callable[[int], None]`, *optional*): told how many settings are done.

    Returns:
        `tuple`: for each setting what is the same everywhere (`setting`, `num_forwards`, `tokens_per_forward`,
        `sequences`), and what is this machine's (`seconds`, `tokens_per_second`).
    """
    prompts_BP = prompts_BP.to(model.device)
    points, times = [], []
    model.diffusion_generate(prompts_BP, max_new_tokens=new_tokens, steps=1, temperature=0.0)  # warms up
    for setting in settings(new_tokens):
        output, seconds = _timed(
            lambda setting=setting: model.diffusion_generate(
                prompts_BP,
                max_new_tokens=new_tokens,
                temperature=0.0,
                suppress_tokens=model.generation_config.eos_token_ids or None,
                return_dict_in_generate=True,
                **setting,
            ),
            model.device,
        )
        points.append(
            {
                "setting": setting,
                "num_forwards": int(output.num_forwards),
                "tokens_per_forward": float(output.tokens_per_forward.double().mean()),
                "sequences": output.sequences.tolist(),
            }
        )
        times.append(_rate(seconds, len(prompts_BP) * new_tokens))
        if advance is not None:
            advance(1)
    return points, times


@torch.no_grad()
def parent_speed(
    parent: PreTrainedModel, prompts_BP: torch.Tensor, new_tokens: int, never: Sequence[int] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of an autoregressive model: greedy `generate` with its key-value cache, one forward per token."""
    prompts_BP = prompts_BP.to(parent.device)

    def write() -> torch.Tensor:
        return parent.generate(
            prompts_BP,
            attention_mask=torch.ones_like(prompts_BP),
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            suppress_tokens=list(never) or None,
            eos_token_id=None,
            pad_token_id=0,
        )

    write()
    sequences, seconds = _timed(write, parent.device)
    point = {"num_forwards": new_tokens, "tokens_per_forward": 1.0, "sequences": sequences.tolist()}
    return point, _rate(seconds, len(prompts_BP) * new_tokens)


@torch.no_grad()
def judge(parent: PreTrainedModel, sequences: Sequence[Sequence[int]], prompt: int) -> dict[str, float]:
    """
    What the parent thinks of texts: `parent_nll`, nats per new token, each given all tokens before it; and
    `distinct`, the share of a text's new tokens that are different ones, since repetition pleases a parent too.

    Args:
        parent (`PreTrainedModel`): an autoregressive model.
        sequences (`Sequence[Sequence[int]]`): texts of one length.
        prompt (`int`): tokens of each that were given.
    """
    ids_BL = torch.tensor(sequences, device=parent.device)
    logits_BNV = parent(ids_BL, use_cache=False).logits[:, prompt - 1 : -1].float()
    new_BN = ids_BL[:, prompt:]
    nll_BN = torch.nn.functional.cross_entropy(
        logits_BNV.transpose(1, 2), new_BN.to(logits_BNV.device), reduction="none"
    )
    rows = new_BN.tolist()
    return {
        "parent_nll": float(nll_BN.double().mean()),
        "distinct": sum(len(set(row)) / len(row) for row in rows) / len(rows),
    }


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result and the least time of a few calls."""
    best = float("inf")
    result = None
    for _ in range(REPEATS):
        _wait(device)
        started = time.perf_counter()
        result = work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return result, best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(seconds: float, tokens: int) -> dict[str, Any]:
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}
