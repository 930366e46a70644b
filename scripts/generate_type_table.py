"""Writes `a2d_hf/detection/type_table.json` from the type tables of the installed transformers.

`a2d detect` must answer from `config.json` alone, in well under a second, so it cannot import transformers (that pulls
torch). This script imports it once, for all, and writes down what detection needs to know about every `model_type`:
what kind of model it is, which of its classes are language models, which fields a config may leave out and what they
then are, and a few facts that no config states (read from the modeling source). Nothing here is a verdict.

Touches only the table. Run it after every upgrade of transformers; a test compares the two.

    python scripts/generate_type_table.py [--check]
"""

import argparse
import dataclasses
import inspect
import json
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any


TABLE = Path(__file__).resolve().parents[1] / "a2d_hf" / "detection" / "type_table.json"

# Types that the rules below cannot place, each with what is special about it.
KIND_BY_HAND = {
    "cpmant": ("encoder", None),  # a prefix language model: bidirectional without a mask of its own
    "xlm": ("encoder", None),  # `causal=False` unless asked for
    "xlnet": ("encoder", None),  # permutation language model: attends both ways
    "blip": ("encoder_decoder", None),  # the text decoder cross-attends to the image in every layer
    "trocr": ("encoder_decoder", None),  # the decoder half of an image-to-text model
    "reformer": ("refused", "its attention sorts tokens into hash buckets, so there is no mask to open"),
    "blt": ("refused", "it cuts bytes into patches with a causal entropy model, and masked bytes have no patches"),
    "gemma4_assistant": ("refused", "it drafts for another model and reads that model's key-value cache"),
    "gemma4_unified_assistant": ("refused", "it drafts for another model and reads that model's key-value cache"),
    "muse_glimmer_assistant": ("diffusion", None),  # a block-diffusion drafter
    "pi0": ("other", None),  # a robot policy
    "shieldgemma2": ("other", None),  # a safety classifier
    "vibevoice": ("audio", None),  # text to speech
}

# Names that a type computes from another field instead of mapping them.
ALIAS_BY_HAND = {
    "bloom": {"hidden_size": "n_embed"},
    "falcon": {"hidden_size": "n_embed"},
    "longcat_flash": {"num_hidden_layers": "num_layers"},
}

# Where a mapping of transformers says what a type is for. Looked through in this order.
KIND_BY_MAPPING = (
    ("encoder", ("MASKED_LM",)),
    (
        "vision",
        (
            "IMAGE", "IMAGE_CLASSIFICATION", "IMAGE_SEGMENTATION", "INSTANCE_SEGMENTATION", "SEMANTIC_SEGMENTATION",
            "UNIVERSAL_SEGMENTATION", "OBJECT_DETECTION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "DEPTH_ESTIMATION",
            "ZERO_SHOT_OBJECT_DETECTION", "VIDEO_CLASSIFICATION", "MASK_GENERATION", "KEYPOINT_DETECTION",
            "KEYPOINT_MATCHING", "BACKBONE", "IMAGE_TO_IMAGE", "MASKED_IMAGE_MODELING", "CAUSAL_IMAGE_MODELING",
            "POSE_ESTIMATION", "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "IMAGE_MATTING", "TEXT_RECOGNITION",
            "TABLE_RECOGNITION", "VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING",
        ),
    ),
    (
        "audio",
        (
            "CTC", "AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR", "TEXT_TO_WAVEFORM",
            "TEXT_TO_SPECTROGRAM", "RNNT", "TDT",
        ),
    ),
    (
        "other",
        (
            "TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION", "DECISION", "RETRIEVAL",
        ),
    ),
    ("encoder", ("TEXT_ENCODING", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")),
)  # fmt: skip
LANGUAGE_MODELS = ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM")

# Config fields whose default is needed when a config.json leaves them out.
FIELDS = """
vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
max_position_embeddings tie_word_embeddings hidden_act is_decoder add_cross_attention layer_types layers_block_type
sliding_window use_sliding_window max_window_layers attention_chunk_size window_size local_attention
attn_logit_softcapping final_logit_softcapping use_bidirectional_attention attn_output_gate rope_theta
partial_rotary_factor rotary_dim rotary_pct alibi position_embedding_type kv_lora_rank q_lora_rank qk_rope_head_dim
qk_nope_head_dim v_head_dim index_topk num_experts num_local_experts n_routed_experts moe_num_experts
num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_intermediate_size expert_ffn_hidden_size
ffn_hidden_size intermediate_size_mlp n_shared_experts num_shared_experts moe_num_shared_experts
shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size enable_moe_block is_moe
block_auto_adjust_ff_dim first_k_dense_replace num_dense_layers moe_layer_start_index moe_layer_freq
decoder_sparse_step mlp_only_layers interleave_moe_layer_step expert_layer_period expert_layer_offset ffn_dim n_inner
dff dense_intermediate_size expansion_ratio word_embed_proj_dim multi_query new_decoder_architecture num_kv_heads
full_attention_interval attn_layer_period attn_layer_offset attn_layer_indices block_types layer_group_size
global_attn_every_n_layers no_rope_layer_interval attention_types linear_num_key_heads linear_num_value_heads
linear_key_head_dim linear_value_head_dim mamba_expand mamba_d_state mamba_d_ssm mamba_n_groups mamba_n_heads
mamba_d_head expand ssm_state_size mamba_num_heads mamba_head_dim n_groups lru_width num_mem_blocks
vocab_size_per_layer_input hidden_size_per_layer_input conv_L_cache attention_hidden_size add_swa_attention_sink_bias
add_full_attention_sink_bias
""".split()


def mapping_members() -> dict[str, dict[str, list[str]]]:
    """`{model_type: {mapping: [class names]}}` over every `MODEL_FOR_*_MAPPING_NAMES` of transformers."""
    from transformers.models.auto import modeling_auto

    members: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for name in dir(modeling_auto):
        if found := re.fullmatch(r"MODEL_FOR_(\w+)_MAPPING_NAMES", name):
            for model_type, classes in getattr(modeling_auto, name).items():
                members[model_type][found[1]] = [classes] if isinstance(classes, str) else list(classes)
    return members


def text_path(config: Any) -> tuple[list[str], Any]:
    """The sub-config names that lead from `config` to its text decoder's config, and that config."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return [], text
    for name in type(config).sub_configs:
        child = getattr(config, name, None)
        if child is text:
            return [name], text
        for inner in getattr(type(child), "sub_configs", {}):
            if getattr(child, inner, None) is text:
                return [name, inner], text
    return ["text_config"], text


def any_text_type(config: Any, path: list[str]) -> bool:
    """Whether the text decoder's `model_type` is read from the config, or fixed by the multimodal class."""
    from transformers import AutoConfig

    for name in path[:-1]:
        config = getattr(config, name)
    return type(config).sub_configs.get(path[-1]) is AutoConfig


def source_of(config_class: type) -> str:
    """The modeling source that belongs to a config class; Llama's where it has none (InternLM3 runs Llama's code)."""
    file = Path(sys.modules[config_class.__module__].__file__)
    source = file.with_name(file.name.replace("configuration_", "modeling_"))
    if not source.exists():
        source = file.parents[1] / "llama" / "modeling_llama.py"
    return source.read_text(encoding="utf-8")


def written_defaults(config: Any, alias: dict[str, str]) -> dict[str, Any]:
    """The default of each field in `FIELDS` as the class writes it, before anything is derived from other fields."""
    config_class = type(config)
    defaults = {}
    written = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name in FIELDS:
        value = written.get(name, written.get(alias.get(name, name), dataclasses.MISSING))
        if value is None or isinstance(value, (bool, int, float, str, list, tuple)):
            defaults[name] = list(value) if isinstance(value, tuple) else value
    # Fields set from keyword arguments in `__post_init__`, for configs saved by older versions.
    keyword = r'kwargs\.(?:pop|get|setdefault)\("(\w+)", ([\d.]+)\)'
    for name, value in re.findall(keyword, inspect.getsource(config_class)):
        if name in FIELDS:
            defaults.setdefault(name, float(value) if "." in value else int(value))
    # Where the class computes one of these, the value it computes for its own defaults.
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "sliding_window"):
        if defaults.get(name) is None and isinstance(computed := getattr(config, name, None), int) and computed > 0:
            defaults[name] = computed
    return defaults


def shortest_period(values: list[str]) -> list[str]:
    """The shortest list that repeats to `values`; `values` itself where nothing does."""
    return next(values[:n] for n in range(1, len(values) + 1) if all(v == values[i % n] for i, v in enumerate(values)))


def language_model_facts(config: Any) -> dict[str, Any]:
    """What detection must know of a text decoder: defaults, other names of fields, layers, positions, feed-forward."""
    config_class = type(config)
    source = source_of(config_class)
    alias = {key: value for key, value in config_class.attribute_map.items() if key in FIELDS}
    renamed = re.findall(r'self\.(\w+) = kwargs\.pop\("(\w+)", self\.\1\)', inspect.getsource(config_class))
    alias |= {key: value for key, value in renamed if key in FIELDS}
    alias |= ALIAS_BY_HAND.get(config_class.model_type, {})
    facts: dict[str, Any] = {"defaults": written_defaults(config, alias)}
    if alias:
        facts["alias"] = alias
    for name in ("layer_types", "layers_block_type", "attention_layers"):
        layers = config.__dict__.get(name) or getattr(config_class, name, None) and getattr(config, name)
        if layers:
            facts["layers"] = shortest_period(list(layers))
            break
    mlp_layers = getattr(config, "mlp_layer_types", None)
    if mlp_layers:  # a model of another depth keeps as many dense layers at its start
        facts["leading_dense"] = next((i for i, kind in enumerate(mlp_layers) if kind != "dense"), len(mlp_layers))
    fields = {field.name for field in dataclasses.fields(config_class)}
    rotary = "rope_parameters" in fields or config.__dict__.get("rope_parameters")
    if rotary or "create_sinusoidal_positions" in source:
        facts["positions"] = "rope"
    elif {"d_rel", "rel_extent"} & fields:
        facts["positions"] = "relative"
    elif re.search(r"alibi", source):
        facts["positions"] = "alibi"
    elif re.search(r"Sinusoidal|positional_encoding\(", source):
        facts["positions"] = "sinusoidal"
    elif re.search(r"wpe|LearnedPositionalEmbedding|positions_embed|position_embeddings? = nn\.Embedding", source):
        facts["positions"] = "learned"
    else:
        facts["positions"] = "none"
    gate = r"self\.(gate_proj|gate_up\w*|input_linear|w3|v1)\b|intermediate_size\)? \* 2"
    facts["gated_ffn"] = bool(re.search(gate, source))
    if re.search(r"self\.(learnable_)?sinks?\b", source):
        facts["sinks"] = True
    return facts


def kind_of(model_type: str, config: Any, mappings: dict[str, list[str]]) -> tuple[str, str | None]:
    """What a type is: decoder, multimodal, recurrent, encoder, encoder_decoder, diffusion, vision, audio, other."""
    if model_type in KIND_BY_HAND:
        return KIND_BY_HAND[model_type]
    if "diffusion_gemma" in model_type:
        return "diffusion", None
    generative = [name for name in LANGUAGE_MODELS if name in mappings]
    if config is not None and config.is_encoder_decoder and (generative or "SPEECH_SEQ_2_SEQ" in mappings):
        return "encoder_decoder", None
    if config is not None and generative:
        path, text = text_path(config)
        source = source_of(type(text))
        if text.is_encoder_decoder:
            return "encoder_decoder", None
        if path or any("vision" in s or "audio" in s or "vq" in s or "codec" in s for s in type(config).sub_configs):
            return "multimodal", None
        if "CAUSAL_LM" not in mappings and model_type != "mistral4":
            return ("multimodal", None) if generative[0] != "SEQ_TO_SEQ_CAUSAL_LM" else ("encoder_decoder", None)
        fields = {field.name for field in dataclasses.fields(type(text))}
        if "is_decoder" in fields and ("MASKED_LM" in mappings or "create_bidirectional_mask" in source):
            return "encoder", None
        if "_is_stateful = True" in source and not {"num_attention_heads", "layer_types"} & fields:
            return "recurrent", None
        return "decoder", None
    for kind, names in KIND_BY_MAPPING:
        if any(name in mappings for name in names):
            return kind, None
    if config is not None and config.is_encoder_decoder:
        return "encoder_decoder", None
    part = getattr(type(config), "base_config_key", "") if config is not None else ""
    if "vision" in part or "vision" in model_type:
        return "vision", None
    if "audio" in part or "audio" in model_type:
        return "audio", None
    return "other", None


def build_table() -> dict[str, Any]:
    """The whole table, as written to disk."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    members = mapping_members()
    types: dict[str, dict[str, Any]] = {}
    configs: dict[str, Any] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        try:
            configs[model_type] = CONFIG_MAPPING[model_type]()
        except Exception:  # a few configs cannot be built without arguments; their mappings still say what they are
            configs[model_type] = None
    for model_type, config in configs.items():
        mappings = members.get(model_type, {})
        kind, note = kind_of(model_type, config, mappings)
        entry: dict[str, Any] = {"kind": kind}
        if note:
            entry["note"] = note
        classes = sorted({name for mapping in LANGUAGE_MODELS for name in mappings.get(mapping, [])})
        if classes:
            entry["lm"] = classes
        if kind in ("decoder", "multimodal", "encoder") and model_type in MODEL_MAPPING_NAMES:
            bases = MODEL_MAPPING_NAMES[model_type]
            entry["base"] = [bases] if isinstance(bases, str) else list(bases)
        if kind == "multimodal":
            path, text = text_path(config)
            entry["path"] = path
            entry["text"] = text.model_type
            if path and any_text_type(config, path):
                entry["any_text"] = True
            if 'text_config["model_type"] = ' in inspect.getsource(type(config)):
                entry["renames_text"] = True
            if not path:
                entry |= language_model_facts(text)
        elif kind == "decoder" or (kind == "encoder" and "CAUSAL_LM" in mappings):
            entry |= language_model_facts(config.get_text_config(decoder=True))
        types[model_type] = entry

    # Text decoders that transformers builds only as a part of a multimodal model.
    for model_type, entry in list(types.items()):
        if entry["kind"] == "multimodal" and entry["path"]:
            _, text = text_path(configs[model_type])
            known = types.get(text.model_type)
            if known is None or known["kind"] not in ("decoder", "recurrent"):
                types[text.model_type] = {"kind": "decoder", "part_of": model_type} | language_model_facts(text)

    dequantizable = [
        method
        for method, config_class in AUTO_QUANTIZATION_CONFIG_MAPPING.items()
        if "dequantize" in inspect.signature(config_class.__init__).parameters and method != "gguf"
    ]
    return {
        "transformers": transformers.__version__,
        "dequantizable": sorted(dequantizable),
        "types": dict(sorted(types.items())),
    }


def render(table: dict[str, Any]) -> str:
    """One line per type: small in the repository, readable in a diff."""
    lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in table["types"].items()]
    return (
        f'{{"transformers": {json.dumps(table["transformers"])},\n'
        f'"dequantizable": {json.dumps(table["dequantizable"])},\n'
        '"types": {\n' + ",\n".join(lines) + "\n}}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    arguments = parser.parse_args()
    text = render(build_table())
    if arguments.check:
        current = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
        print("up to date" if current == text else "out of date: run scripts/generate_type_table.py")
        return int(current != text)
    TABLE.write_text(text, encoding="utf-8")
    print(f"{TABLE}: {text.count(chr(10)) - 4} types, {len(text) // 1024} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
