"""What is tested of one causal language model type: a tiny random model of it, converted, column by column.

Owns the checks behind docs/architectures.md. No type has code of its own here: where a default configuration lacks
what every real checkpoint of the type sets, `COMPLETED` fills it in.
"""

import json
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any


LENGTH, BLOCK, MASK_ID, TOLERANCE = 24, 6, 120, 5e-5

# What the default configuration of a type leaves out and every checkpoint of it sets.
COMPLETED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "dots3_note_text": {"head_dim": 24},  # must stay the sum of its two parts
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 128,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "ple_embed_dim": 64,
        "split_ngram_parts": 4,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "kv_channels": 32,
    },
}


def causal_types() -> list[str]:
    """The types of transformers' causal language model mapping, in alphabetical order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str):
    """The shrunk configuration of a type, and what of its structure got lost (`[]`: nothing)."""
    from transformers import CONFIG_MAPPING

    from a2d_hf.shrinking import lost_structure, shrink_config

    full = CONFIG_MAPPING[model_type]()
    overrides = dict(COMPLETED.get(model_type, {}))
    text = full.get_text_config()
    if text is not full and text.model_type in COMPLETED:
        shrunk = shrink_config(text, **COMPLETED[text.model_type]).to_dict()
        overrides[next(name for name, part in vars(full).items() if part is text)] = shrunk
    small = shrink_config(full, **overrides)
    return small, lost_structure(full, small)


def tiny_parent(model_type: str, attn_implementation: str | None = None):
    """A random model of a type: seeded, in evaluation mode, with weights wide enough for edges to matter."""
    import torch
    from transformers import AutoModelForCausalLM

    config, _ = tiny_config(model_type)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def detected(model_type: str) -> dict[str, Any]:
    """What `a2d detect --json` says of the type's configuration."""
    from transformers import CONFIG_MAPPING

    from a2d_hf.detection import detect

    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(model_type)[0] if model_type in COMPLETED else CONFIG_MAPPING[model_type]()
        values = {**config.to_dict(), "model_type": model_type}
        (Path(folder) / "config.json").write_text(json.dumps(values, default=str))
        return detect(folder).to_dict()


def check_type(model_type: str) -> dict[str, Any]:
    """Every column of one type. A check that raises gives its error as text; nothing is left out."""
    warnings.filterwarnings("ignore")
    row: dict[str, Any] = {"type": model_type, "seconds": 0.0}
    start = time.perf_counter()
    try:
        found = detected(model_type)
        row["verdict"], row["codes"] = found["verdict"], [reason["code"] for reason in found["reasons"]]
        if row["verdict"] != "unsupported":
            _check_conversion(model_type, row)
    except Exception as error:  # a type that cannot be built is a row of the table, with the reason
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _check_conversion(model_type: str, row: dict[str, Any]) -> None:
    import torch

    from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
    from a2d_hf.modeling.gates import identity_gate, reach_gate

    torch.set_num_threads(1)
    _, row["lost"] = tiny_config(model_type)
    parent, backbone = tiny_parent(model_type), tiny_parent(model_type)
    row["attention"] = backbone.config._attn_implementation
    model = A2DForMaskedDiffusion.from_causal_lm(backbone, mask_token_id=MASK_ID, allow_hybrid=True).eval()

    identity = identity_gate(model, parent)
    row["identity"] = identity.passed
    row["identity_difference"] = max(identity.detail["max_abs_diff"], identity.detail["max_abs_diff_explicit_mask"])
    reach = reach_gate(model)
    row["reach"], row["reach_message"] = reach.passed, reach.message
    row["open_layers"], row["layers"] = reach.detail.get("open_layers", 0), reach.detail.get("layers", 0)
    row["window_crossed"] = reach.detail.get("window_crossed")
    row["block_causal"] = all(
        layer["block_causal_exact"] for layer in reach.detail.get("by_layer", []) if not layer["closed"]
    )

    generator = torch.Generator().manual_seed(2)
    x = torch.randint(3, 100, (1, LENGTH), generator=generator)
    noisy = x.clone()
    noisy[0, ::2] = MASK_ID
    block = AttentionPattern.block_causal(BLOCK)
    checks = {
        "bd3lm": lambda: _bd3lm_difference(model, x, noisy, block),
        "documents": lambda: _documents_difference(model, x),
        "cache": lambda: _cache_difference(model, x, block),
        "rows": lambda: _rows_difference(model, x),
        "padding": lambda: _padding_difference(model, x),
        "eager": lambda: _eager_difference(model_type, model, x),
    }
    for name, check in checks.items():
        try:
            with torch.no_grad():
                difference = check()
            row[name], row[f"{name}_difference"] = difference <= TOLERANCE, difference
        except Exception as error:
            row[name], row[f"{name}_error"] = False, f"{type(error).__name__}: {error}"[:200]
    for name, check in (("gradients", _gradients_reach), ("saved", _saves_exactly)):
        try:
            row[name] = check(model, x)
        except Exception as error:
            row[name], row[f"{name}_error"] = False, f"{type(error).__name__}: {error}"[:200]


def _apart(first, second) -> float:
    return float((first - second).abs().max())


def _bd3lm_difference(model, x, noisy, block) -> float:
    """The doubled sequence against one forward pass per block, written out."""
    import torch

    from a2d_hf.modeling import AttentionPattern

    doubled = model(torch.cat([noisy, x], 1), attention_pattern=AttentionPattern.bd3lm(BLOCK)).logits[:, :LENGTH]
    worst = 0.0
    for start in range(0, LENGTH, BLOCK):
        prefix = torch.cat([x[:, :start], noisy[:, start : start + BLOCK]], 1)
        alone = model(prefix, attention_pattern=block).logits[:, start:]
        worst = max(worst, _apart(alone, doubled[:, start : start + BLOCK]))
    return worst


def _documents_difference(model, x) -> float:
    import torch

    first, second = x[:, :10], x[:, 10:]
    ids = torch.tensor([[0] * 10 + [1] * (LENGTH - 10)])
    packed = model(x, document_ids=ids).logits
    return max(_apart(packed[:, :10], model(first).logits), _apart(packed[:, 10:], model(second).logits))


def _cache_difference(model, x, block) -> float:
    whole, cache, worst = model(x, attention_pattern=block).logits, None, 0.0
    for start in range(0, LENGTH, BLOCK):
        out = model(x[:, start : start + BLOCK], attention_pattern=block, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if cache is None:
            raise ValueError("the parent returns no cache")
        worst = max(worst, _apart(out.logits, whole[:, start : start + BLOCK]))
    return worst


def _rows_difference(model, x) -> float:
    import torch

    wanted = torch.zeros(x.shape, dtype=torch.bool)
    wanted[0, [1, 5, 9]] = True
    return _apart(model(x, logits_mask=wanted).logits, model(x).logits[wanted])


def _padding_difference(model, x) -> float:
    import torch

    padding = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(x)], 1)
    padded = model(torch.cat([padding, x], 1), attention_mask=mask).logits[:, 5:]
    return _apart(padded, model(x).logits)


def _eager_difference(model_type: str, model, x) -> float:
    from a2d_hf.modeling import A2DForMaskedDiffusion

    parent = tiny_parent(model_type, "eager")
    other = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID, allow_hybrid=True).eval()
    return _apart(other(x).logits, model(x).logits)


def _gradients_reach(model, x) -> bool:
    """Finite gradients of the masked loss, in every parameter that the parent's own loss reaches."""
    import torch

    def reached(loss) -> set[str]:
        model.zero_grad()
        loss.backward()
        names = set()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and bool((parameter.grad != 0).any()):
                if not bool(parameter.grad.isfinite().all()):
                    raise ValueError(f"the gradient of {name} is not finite")
                names.add(name)
        model.zero_grad()
        return names

    labels = x.clone()
    labels[0, ::2] = -100
    by_parent = reached(
        torch.nn.functional.cross_entropy(model(x, attention_pattern="causal").logits[0, :-1], x[0, 1:])
    )
    # Which experts and routers get a gradient is the routing's choice, and opened attention routes otherwise.
    missed = {
        name
        for name in by_parent - reached(model(x, labels=labels).loss)
        if "expert" not in name and "router" not in name
    }
    if missed:
        raise ValueError(f"no gradient in {sorted(missed)[0]} and {len(missed) - 1} more")
    return True


def _saves_exactly(model, x) -> bool:
    import torch

    from a2d_hf.modeling import A2DForMaskedDiffusion

    folder = tempfile.mkdtemp()
    try:
        model.save_pretrained(folder)
        again = A2DForMaskedDiffusion.from_pretrained(folder)
        parent = type(model.backbone).from_pretrained(folder, config=model.config.text_config)
        for ours, theirs in ((model, again), (model.backbone, parent)):
            loaded = theirs.state_dict()
            for name, tensor in ours.state_dict().items():
                if not torch.equal(tensor, loaded[name]):
                    raise ValueError(f"{name} differs after loading")
        with torch.no_grad():  # buffers are not among the weights, and may be what closes attention
            if _apart(model(input_ids=x).logits, again.eval()(input_ids=x).logits) > TOLERANCE:
                raise ValueError("the model loaded again computes something else")
    finally:
        shutil.rmtree(folder)
    return True
