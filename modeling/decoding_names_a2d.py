"""The names of decoding: which rules there are, and what other projects call them.

Owns the lists of selectors and remasking rules, which of them go together, and the refusals that name ours. Knows
nothing of tensors.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .generation_config_a2d import A2DGenerationConfig

SELECTORS = ("confidence", "margin", "entropy", "random", "threshold", "entropy_bound")
REMASKING = ("p2", "remdm_cap", "remdm_rescale", "remdm_conf", "remdm_loop")
ADAPTIVE_SELECTORS = ("threshold", "entropy_bound")
SELF_SPECULATION = ("causal", "parent")
APPROXIMATE_CACHES = ("prefix", "dual")
CACHE_IMPLEMENTATIONS = ("dynamic", "static")

# What other projects call these parameters.
PEER_ARGUMENTS = {
    "alg": "`selector`",
    "algorithm": "`selector`",
    "sampler": "`selector`",
    "gen_length": "`max_new_tokens`",
    "block_length": "`block_size`",
    "canvas_length": "`block_size`",
    "num_steps": "`steps`",
    "num_inference_steps": "`steps`",
    "diffusion_steps": "`steps`",
    "denoising_steps": "`steps`",
    "max_denoising_steps": "`steps`",
    "steps_per_block": "`steps`, counted over the whole generation",
    "confidence_threshold": '`threshold`, with `selector="threshold"`',
    "gamma": '`entropy_bound`, with `selector="entropy_bound"`',
    "eb_gamma": '`entropy_bound`, with `selector="entropy_bound"`',
    "mask_id": "`mask_token_id`",
    "stochastic_transfer": '`selector="random"`',
    "cfg": "`guidance_scale`, one more than theirs",
    "cfg_scale": "`guidance_scale`, one more than theirs",
    "cfg_keep_tokens": "`guidance_keep_tokens`",
    "eta": '`remasking_eta`, with `remasking="remdm_cap"`',
    "max_active_blocks": "`pipeline_depth`",
    "return_dict": "`return_dict_in_generate`",
    "right_shift_logits": "`config.token_shift`; `forward` applies it, so remove the argument",
}
PEER_SELECTORS = {
    "low_confidence": 'selector="confidence"',
    "low_confidence_static": 'selector="confidence"',
    "maskgit_plus": 'selector="confidence"',
    "topk": 'selector="confidence"',
    "max_prob": 'selector="confidence"',
    "topk_margin": 'selector="margin"',
    "margin_confidence": 'selector="margin"',
    "neg_entropy": 'selector="entropy"',
    "origin": 'selector="random"',
    "ancestral": 'selector="random"',
    "low_confidence_dynamic": 'selector="threshold"',
    "confidence_threshold": 'selector="threshold"',
    "eb": 'selector="entropy_bound"',
    "eb_sampler": 'selector="entropy_bound"',
    "p2": 'remasking="p2"',
    "remdm": 'remasking="remdm_cap"',
    "remdm-cap": 'remasking="remdm_cap"',
    "remdm-rescale": 'remasking="remdm_rescale"',
    "remdm-conf": 'remasking="remdm_conf"',
    "remdm-loop": 'remasking="remdm_loop"',
}


def check_names(kwargs: Mapping[str, Any], known: Collection[str], fields: Sequence[str]) -> None:
    """Refuses parameters that nobody knows, with our name for those that other projects know."""
    for name, value in kwargs.items():
        if name in known:
            continue
        if name in PEER_ARGUMENTS:
            if name in ("alg", "algorithm", "sampler") and value in PEER_SELECTORS:
                raise ValueError(f"`{name}={value!r}` is called `{PEER_SELECTORS[value]}` here.")
            raise ValueError(f"`{name}` is called {PEER_ARGUMENTS[name]} here.")
        close = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(fields)}."
        raise ValueError(f"Unknown decoding parameter `{name}`; {hint}")


def check_rules(config: "A2DGenerationConfig") -> None:
    """Refuses selectors and remasking rules that do not exist, or do not go together."""
    _check_selector(config.selector)
    _check_remasking(config)
    deep = config.pipeline_depth is not None and config.pipeline_depth > 1
    if deep and config.remasking is not None:
        raise ValueError("`remasking` works on one block at a time: leave out `remasking`, or `pipeline_depth`.")
    if deep and config.selector in SELECTORS and config.selector not in ADAPTIVE_SELECTORS:
        raise ValueError(
            f"`pipeline_depth={config.pipeline_depth}` needs a selector that may commit nothing in a block it is not "
            'sure of: set `selector="threshold"` or `"entropy_bound"`.'
        )
    choices = {
        "self_speculation": SELF_SPECULATION,
        "approximate_cache": APPROXIMATE_CACHES,
        "cache_implementation": CACHE_IMPLEMENTATIONS,
    }
    for name, values in choices.items():
        value = vars(config)[name]
        if value is not None and value not in values:
            raise ValueError(f"`{name}` must be None or one of {', '.join(values)}, not {value!r}.")
    _check_alone(config, deep)
    loop = config.remasking_loop
    if loop is not None and not (
        isinstance(loop, list | tuple)
        and len(loop) == 3
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in loop)
        and 0 < loop[1] < loop[0] < 1
        and 0 < loop[2] < 1
    ):
        raise ValueError(
            f"`remasking_loop` must be [t_on, t_off, alpha] with 0 < t_off < t_on < 1 and 0 < alpha < 1, not {loop!r}."
        )


def _check_alone(config: "A2DGenerationConfig", deep: bool) -> None:
    """Verification and the approximate caches are defined for the plain loop, one block after the other."""
    beside = {
        "remasking": config.remasking is not None,
        "guidance_scale": config.guidance_scale not in (None, 1),
        "pipeline_depth": deep,
        'cache_implementation="static"': config.cache_implementation == "static",
    }
    for name in ("self_speculation", "approximate_cache"):
        if vars(config)[name] is not None:
            for other, on in beside.items():
                if on:
                    raise ValueError(f"`{name}` does not go together with `{other}`: leave one of them out.")


def _check_selector(selector: Any) -> None:
    if selector is None or callable(selector) or selector in SELECTORS:
        return
    if selector in PEER_SELECTORS:
        raise ValueError(f"`selector={selector!r}` is called `{PEER_SELECTORS[selector]}` here.")
    raise ValueError(f"`selector` must be one of {', '.join(SELECTORS)} or a function, not {selector!r}.")


def _check_remasking(config: "A2DGenerationConfig") -> None:
    remasking = config.remasking
    if remasking is None:
        return
    if remasking not in REMASKING:
        if remasking in SELECTORS or remasking in PEER_SELECTORS:
            # dLLM and LLaDA call the choice of positions "remasking"; nothing is put back there.
            ours = PEER_SELECTORS.get(remasking, f'selector="{remasking}"')
            raise ValueError(f"`remasking={remasking!r}` is called `{ours}` here.")
        raise ValueError(f"`remasking` must be None or one of {', '.join(REMASKING)}, not {remasking!r}.")
    if remasking == "p2" and config.selector not in (None, "confidence"):
        raise ValueError('`remasking="p2"` ranks by confidence: use it with `selector="confidence"`.')
    if remasking != "p2" and config.selector not in (None, "confidence", "random"):
        raise ValueError(f'`remasking="{remasking}"` draws its positions itself: leave `selector` out.')
