"""The rules, one shape of config each: what converts, what is refused and with which reason."""

import json

import pytest

from .conftest import SIZES, codes, llama


def kind(model_type: str, architecture: str, **fields) -> dict:
    return {"model_type": model_type, "architectures": [architecture]} | fields


REMOTE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}

# Shapes on which another detector is known to give a wrong verdict or a wrong reason.
WRONGLY_ACCEPTED = {
    "dream": (kind("Dream", "DreamModel", mask_token_id=151666, **SIZES), "unsupported", {"paradigm.diffusion"}),
    "bert": (kind("bert", "BertForMaskedLM"), "unsupported", {"paradigm.encoder"}),
    "vit": (kind("vit", "ViTForImageClassification"), "unsupported", {"paradigm.vision"}),
    "jamba": (kind("jamba", "JambaForCausalLM", num_hidden_layers=32), "hybrid", set()),
    "qwen3_next": (kind("qwen3_next", "Qwen3NextForCausalLM"), "hybrid", set()),
    "falcon_h1": (kind("falcon_h1", "FalconH1ForCausalLM"), "hybrid", set()),
    "llama_awq": (llama(quantization_config={"quant_method": "awq", "bits": 4}), "unsupported", {"weights.quantized"}),
    "llama_bnb": (llama(quantization_config={"load_in_4bit": True}), "unsupported", {"weights.quantized"}),
    "zamba": (kind("zamba", "ZambaForCausalLM"), "hybrid", set()),
    "bamba": (kind("bamba", "BambaForCausalLM", attn_layer_indices=[9, 18]), "hybrid", set()),
    "recurrent_gemma": (kind("recurrent_gemma", "RecurrentGemmaForCausalLM"), "hybrid", set()),
    "roberta": (kind("roberta", "RobertaForMaskedLM"), "unsupported", {"paradigm.encoder"}),
    "electra": (kind("electra", "ElectraForPreTraining"), "unsupported", {"paradigm.encoder"}),
    "trocr": (kind("trocr", "TrOCRForCausalLM"), "unsupported", {"paradigm.encoder_decoder"}),
}
WRONGLY_REFUSED = {
    "gpt_neo": (kind("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 12]]), "supported", set()),
    "mpt": (kind("mpt", "MPTForCausalLM", d_model=512, n_heads=8, n_layers=4, auto_map=REMOTE), "supported", set()),
    "xglm": (kind("xglm", "XGLMForCausalLM"), "supported", set()),
    "gemma3": (kind("gemma3", "Gemma3ForConditionalGeneration", text_config={}), "supported", set()),
    "llama4": (kind("llama4", "Llama4ForConditionalGeneration", text_config={}), "supported", set()),
    "mistral3": (
        kind("mistral3", "Mistral3ForConditionalGeneration", text_config={"model_type": "mistral"} | SIZES),
        "supported",
        set(),
    ),
    "t5": (kind("t5", "T5ForConditionalGeneration"), "unsupported", {"paradigm.encoder_decoder"}),
    "whisper": (kind("whisper", "WhisperForConditionalGeneration"), "unsupported", {"paradigm.encoder_decoder"}),
    "llada": (kind("llada", "LLaDAModelLM", auto_map=REMOTE), "unsupported", {"paradigm.diffusion"}),
    "mamba": (kind("mamba", "MambaForCausalLM"), "unsupported", {"paradigm.recurrent"}),
    "gpt_oss": (
        kind("gpt_oss", "GptOssForCausalLM", quantization_config={"quant_method": "mxfp4"}), "supported", set()
    ),
    "gpt_oss_dequantized": (kind("gpt_oss", "GptOssForCausalLM"), "supported", set()),
    "gpt_bigcode": (kind("gpt_bigcode", "GPTBigCodeForCausalLM"), "supported", set()),
    "ctrl": (kind("ctrl", "CTRLLMHeadModel"), "supported", set()),
    "openai-gpt": (kind("openai-gpt", "OpenAIGPTLMHeadModel"), "supported", set()),
    "biogpt": (kind("biogpt", "BioGptForCausalLM"), "supported", set()),
}  # fmt: skip


@pytest.mark.parametrize("name", [*WRONGLY_ACCEPTED, *WRONGLY_REFUSED])
def test_shapes_on_which_others_err(name: str, verdict_of):
    config, verdict, reasons = (WRONGLY_ACCEPTED | WRONGLY_REFUSED)[name]
    found = verdict_of(config)
    assert (found.verdict, set(codes(found))) == (verdict, reasons)


@pytest.mark.parametrize(
    ("config", "tag"),
    [
        (kind("bloom", "BloomForCausalLM", n_embed=64, n_head=4), "pos.alibi"),
        (kind("falcon", "FalconForCausalLM", alibi=True), "pos.alibi"),
        (kind("falcon", "FalconForCausalLM", alibi=False), "pos.rope"),
        (kind("gptj", "GPTJForCausalLM"), "pos.rope"),
        (llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}), "pos.rope.llama3"),
        (kind("mpt", "MptForCausalLM", attn_config={"alibi": False}), "pos.learned"),
        (kind("deepseek_v3", "DeepseekV3ForCausalLM", quantization_config={"quant_method": "fp8"}), "attn.mla"),
    ],
)
def test_positions_and_attention_that_others_mislabel(config: dict, tag: str, verdict_of):
    assert tag in verdict_of(config).capabilities


@pytest.mark.parametrize(
    "config",
    [
        kind("a2d", "A2DForMaskedDiffusion", text_config=llama(), mask_token_id=5),
        kind("a2d-qwen3", "A2DQwen3LMHeadModel"),
        kind("Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", auto_map=REMOTE),
        kind("sdar_moe", "SDARMoeForCausalLM", auto_map=REMOTE),
        kind("llada2_moe", "LLaDA2MoeModelLM", auto_map=REMOTE),
        kind("rnd1", "RND1LM", auto_map=REMOTE),
        kind("diffusion_gemma", "DiffusionGemmaForBlockDiffusion"),
        kind("llama", "LlamaForCausalLM", auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"}, **SIZES),
        kind("unheard_of", "UnheardForCausalLM", mask_token_id=7, auto_map=REMOTE),
        kind("qwen2", "Qwen2ForCausalLM", mask_token_id=7, block_size=32, **SIZES),
        kind("qwen3", "Qwen3ForCausalLM", dlm_paradigm="bidirectional", **SIZES),
        kind("llava", "LlavaForConditionalGeneration", text_config=kind("llada", "LLaDAModelLM")),
    ],
    ids=lambda config: f"{config['model_type']}-{config['architectures'][0]}",
)
def test_what_is_a_diffusion_model_already_is_refused_as_one(config: dict, verdict_of):
    assert codes(verdict_of(config)) == ["paradigm.diffusion"]


@pytest.mark.parametrize("model_type", ["diffllama", "gemma", "doge"])
def test_names_that_only_look_like_diffusion_convert(model_type: str, verdict_of):
    assert verdict_of({"model_type": model_type}).verdict == "supported"


@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen3ForSequenceClassification", "Qwen3Model", "Qwen3ForTokenClassification", "Qwen3ForProcessRewardModel",
        "Qwen3ForRewardModel", "Qwen3ForQuestionAnswering", "Qwen3Embedding",
    ],
)  # fmt: skip
def test_a_causal_type_without_a_language_model_head_is_refused(architecture: str, verdict_of):
    assert codes(verdict_of(kind("qwen3", architecture, **SIZES))) == ["task.no_lm_head"]


def test_a_bidirectional_embedding_model_of_a_causal_type_is_an_encoder(verdict_of):
    config = kind("gemma3_text", "Gemma3TextModel", use_bidirectional_attention=True)
    assert set(codes(verdict_of(config))) == {"task.no_lm_head", "paradigm.encoder"}
    assert codes(verdict_of(llama(is_causal=False))) == ["paradigm.encoder"]


def test_an_encoder_with_a_classifier_is_refused_for_both_reasons(verdict_of):
    config = kind("xlm-roberta", "XLMRobertaForSequenceClassification")
    assert set(codes(verdict_of(config))) == {"paradigm.encoder", "task.no_lm_head"}


def test_an_encoder_trained_as_a_decoder_converts(verdict_of):
    decoder = kind("bert", "BertLMHeadModel", is_decoder=True)
    assert verdict_of(decoder).verdict == "supported"
    assert verdict_of(decoder | {"add_cross_attention": True}).verdict == "unsupported"
    assert verdict_of(decoder | {"is_decoder": False}).verdict == "unsupported"


def test_remote_code_is_no_reason_where_transformers_has_the_type(verdict_of):
    assert verdict_of(kind("phi3", "Phi3ForCausalLM", auto_map=REMOTE)).verdict == "supported"
    assert verdict_of(kind("internlm3", "InternLM3ForCausalLM", auto_map=REMOTE)).verdict == "supported"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (kind("internlm2", "InternLM2ForCausalLM", auto_map=REMOTE), "code.remote"),
        (kind("minicpm", "MiniCPMForCausalLM"), "architecture.unknown"),
        (kind("gpt2", "GPT2LMHeadCustomModel", auto_map=REMOTE), "code.remote"),  # multi-query, under gpt2's name
        (llama(architectures=["LlamaForCausalLMEagle3"]), "architecture.unknown"),  # a draft head
        (kind("llava", "LlavaLlamaForCausalLM", mm_vision_tower="clip", **SIZES), "architecture.unknown"),
        (
            kind("llava", "LlavaForConditionalGeneration", text_config={"model_type": "unheard"}),
            "architecture.unknown",
        ),
        (kind("step3p5", "Step3p5ForCausalLM", auto_map=REMOTE), "code.remote"),  # only a part of step3p7
        (kind("reformer", "ReformerModelWithLMHead", is_decoder=True), "architecture.unknown"),
    ],
)
def test_classes_that_transformers_does_not_have_are_refused(config: dict, code: str, verdict_of):
    assert codes(verdict_of(config)) == [code]


@pytest.mark.parametrize(
    ("config", "summary"),
    [
        (kind("jamba", "JambaForCausalLM", num_hidden_layers=32, attn_layer_period=8, attn_layer_offset=4), "4 of 32"),
        (kind("bamba", "BambaForCausalLM", num_hidden_layers=32, attn_layer_indices=[9, 18, 27]), "3 of 32"),
        (kind("lfm2", "Lfm2ForCausalLM", num_hidden_layers=16, full_attn_idxs=[2, 5, 8, 10, 12, 14]), "6 of 16"),
        (kind("qwen3_next", "Qwen3NextForCausalLM", num_hidden_layers=48, full_attention_interval=4), "12 of 48"),
        (kind("recurrent_gemma", "RecurrentGemmaForCausalLM", num_hidden_layers=26), "8 of 26"),
        (kind("falcon_h1", "FalconH1ForCausalLM", num_hidden_layers=44), "44 of 44"),
        (kind("nemotron_h", "NemotronHForCausalLM", hybrid_override_pattern="M-M*-ME"), "1 of 7"),
        (kind("zamba2", "Zamba2ForCausalLM", num_hidden_layers=2, layers_block_type=["mamba", "hybrid"]), "1 of 2"),
        (
            kind("kimi_linear", "KimiLinearForCausalLM", num_hidden_layers=4,
                 linear_attn_config={"full_attn_layers": [4], "kda_layers": [1, 2, 3]}),
            "1 of 4",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)  # fmt: skip
def test_hybrids_say_how_many_layers_open(config: dict, summary: str, verdict_of):
    found = verdict_of(config)
    assert found.verdict == "hybrid" and found.exit_code == 0
    assert found.layers.sentence().startswith(f"{summary} layers open: ")


@pytest.mark.parametrize(
    ("layer_types", "verdict"),
    [(["mamba"] * 3 + ["attention"], "hybrid"), (["attention"] * 4, "supported"), (["mamba"] * 4, "unsupported")],
)
def test_what_a_hybrid_type_is_depends_on_its_layers(layer_types: list[str], verdict: str, verdict_of):
    config = kind("granitemoehybrid", "GraniteMoeHybridForCausalLM", layer_types=layer_types, **SIZES)
    found = verdict_of(config)
    assert found.verdict == verdict
    assert codes(found) == (["paradigm.recurrent"] if verdict == "unsupported" else [])


@pytest.mark.parametrize(
    ("config", "text_type"),
    [
        (kind("qwen3_vl", "Qwen3VLForConditionalGeneration", text_config=SIZES), "qwen3_vl_text"),
        (kind("qwen2_vl", "Qwen2VLForConditionalGeneration", vision_config={}, **SIZES), "qwen2_vl_text"),  # flat
        (kind("llava", "LlavaForConditionalGeneration", text_config={"model_type": "qwen2"} | SIZES), "qwen2"),
        (kind("qwen2_5_omni", "Qwen2_5OmniModel", thinker_config={"text_config": SIZES}), "qwen2_5_omni_text"),
        (kind("kimi_k25", "KimiK25ForConditionalGeneration", text_config={"model_type": "kimi_k2"}), "deepseek_v3"),
        (kind("paligemma", "PaliGemmaForConditionalGeneration", text_config={"model_type": "gemma2"}), "gemma2"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_of_a_multimodal_model_the_text_model_converts_alone(config: dict, text_type: str, verdict_of):
    found = verdict_of(config)
    assert (found.verdict, found.text_only, found.model_type) == ("supported", True, text_type)


def test_a_multimodal_model_with_an_encoder_decoder_inside_is_refused(verdict_of):
    config = kind("blip-2", "Blip2ForConditionalGeneration", text_config={"model_type": "t5"})
    assert codes(verdict_of(config)) == ["paradigm.encoder_decoder"]


@pytest.mark.parametrize(
    ("quantization", "tags"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {"weights.fp8", "ingest.dequantize"}),
        ({"quant_method": "mxfp4"}, {"weights.mxfp4", "ingest.dequantize"}),
        ({"quant_method": "compressed-tensors"}, {"weights.compressed_tensors", "ingest.dequantize"}),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, {"weights.modelopt", "ingest.dequantize"}),
    ],
)
def test_formats_that_loading_undoes_are_supported(quantization: dict, tags: set, verdict_of):
    found = verdict_of(llama(quantization_config=quantization))
    assert found.verdict == "supported" and tags <= set(found.capabilities)


@pytest.mark.parametrize(
    "quantization",
    [
        GPTQ,
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"load_in_4bit": True},
        {"group_size": 64, "bits": 4},  # MLX writes no method
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"a": {}}},
        {"quant_method": "bitnet"},
        {"quant_method": "a format of tomorrow"},
        {"nothing": "known"},
    ],
)
def test_formats_that_lost_the_full_weights_are_refused(quantization: dict, verdict_of):
    assert codes(verdict_of(llama(quantization_config=quantization))) == ["weights.quantized"]


def test_a_quantized_copy_names_its_full_precision_source(verdict_of, tmp_path):
    found = verdict_of(llama(quantization_config=GPTQ, _name_or_path="Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"))
    assert "Qwen2.5-7B-Instruct instead" in found.reasons[0].message
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\nbase_model:\n- owner/original\n---\n# A copy\n")
    assert "convert owner/original instead" in verdict_of(llama(quantization_config=GPTQ)).reasons[0].message


def test_a_window_counts_only_where_it_is_in_force(verdict_of):
    qwen = kind("qwen2", "Qwen2ForCausalLM", sliding_window=64, max_window_layers=0, **SIZES)
    assert "attn.sliding" not in verdict_of(qwen | {"use_sliding_window": False}).capabilities
    assert "attn.sliding" in verdict_of(qwen | {"use_sliding_window": True}).capabilities
    assert "attn.sliding" not in verdict_of(llama(sliding_window=64)).capabilities  # Llama has no such field
    mistral = kind("mistral", "MistralForCausalLM", **SIZES)
    assert "attn.sliding" in verdict_of(mistral | {"sliding_window": 64}).capabilities
    assert "attn.sliding" not in verdict_of(mistral | {"sliding_window": None}).capabilities
    assert "attn.sliding" not in verdict_of(mistral | {"sliding_window": 512}).capabilities  # the whole context
    both = verdict_of(mistral | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64})
    assert {"attn.sliding", "attn.full"} <= set(both.capabilities)


def test_inferred_says_what_no_test_has_proven_yet(verdict_of):
    assert not verdict_of(llama()).inferred
    assert verdict_of(llama(architectures=None)).inferred
    assert verdict_of({"model_type": "cohere"}).inferred


@pytest.mark.parametrize(
    ("config", "active_share"),
    [
        (kind("mixtral", "MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2), 12.88 / 46.70),
        (kind("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
              head_dim=128),
         3.35 / 30.53),
        (kind("deepseek_v3", "DeepseekV3ForCausalLM"), 37.55 / 671.0),
    ],
    ids=lambda value: "" if isinstance(value, float) else value["model_type"],
)  # fmt: skip
def test_a_mixture_of_experts_is_planned_by_what_sees_a_token(config: dict, active_share: float, verdict_of):
    plan = verdict_of(config, gpu="h100").plan
    counts = plan["parameters"]
    assert counts["active"] / counts["total"] == pytest.approx(active_share, rel=0.02)
    # Memory holds every expert, time only the active ones.
    assert plan["memory_gb"]["decode"] * 1e9 >= 2 * counts["total"]
    assert plan["gpu"]["hours"]["full"] < plan["tokens"] * 8 * counts["total"] / (0.4 * 989e12 * 3600)


# Sizes that the publishers state, in billions: all parameters, and those that see one token.
PUBLISHED = {
    "dbrx": (
        kind("dbrx", "DbrxForCausalLM", d_model=6144, n_heads=48, n_layers=40, vocab_size=100352,
             attn_config={"kv_n_heads": 8},
             ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}),
        132, 36,
    ),
    "deepseek-v2": (
        kind("deepseek_v2", "DeepseekV2ForCausalLM", hidden_size=5120, num_hidden_layers=60, num_attention_heads=128,
             num_key_value_heads=128, n_routed_experts=160, num_experts_per_tok=6, moe_intermediate_size=1536,
             n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=1536, intermediate_size=12288,
             vocab_size=102400),
        236, 21,
    ),
    "jamba-1.5-mini": (
        kind("jamba", "JambaForCausalLM", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, num_experts=16, num_experts_per_tok=2, vocab_size=65536),
        52, 12,
    ),
    "granite-4-h-small": (
        kind("granitemoehybrid", "GraniteMoeHybridForCausalLM", hidden_size=4096, num_hidden_layers=40,
             num_attention_heads=32, num_key_value_heads=8, intermediate_size=768, shared_intermediate_size=1536,
             num_local_experts=72, num_experts_per_tok=10, vocab_size=100352, mamba_n_heads=128, mamba_d_head=64,
             mamba_d_state=128, layer_types=(["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4),
        32, 9,
    ),
    "ernie-4.5-21b-a3b": (
        kind("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", hidden_size=2560, intermediate_size=12288,
             moe_intermediate_size=1536, moe_num_experts=64, moe_k=6, moe_num_shared_experts=2,
             moe_layer_start_index=1, num_hidden_layers=28, num_attention_heads=20, num_key_value_heads=4,
             vocab_size=103424),
        21.8, 3.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_mixtures_are_counted_as_their_publishers_count_them(name: str, verdict_of):
    config, total, active = PUBLISHED[name]
    counts = verdict_of(config).plan["parameters"]
    assert counts["total"] / 1e9 == pytest.approx(total, rel=0.03)
    assert counts["active"] / 1e9 == pytest.approx(active, rel=0.04)


def test_the_plan_follows_its_own_formula(verdict_of):
    plan = verdict_of(llama(num_key_value_heads=4), gpu="a100").plan
    layer = 4 * 64 * 64 + 3 * 64 * 128
    total = 4 * layer + 2 * 1000 * 64
    activations = 2 * 512 * ((4 + 8) * 64 + 2 * 64 + 3 * 128) + 8 * 512 * 1000
    adapters = 16 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    assert plan["parameters"] == {"total": total, "active": total, "source": "config"}
    assert plan["tokens"] == 20 * total
    memory = {
        "full": 16 * total + activations,
        "lora": 2 * total + 16 * adapters + activations,
        "qlora": 0.516 * (total - 2 * 64_000) + 2 * 2 * 64_000 + 16 * adapters + activations,
        "decode": 2 * total + 2 * (4 * (16 + 16)) * 512 * 4 + 4 * 128 * 1000,
    }
    assert plan["memory_gb"] == {name: float(f"{value / 1e9:.3g}") for name, value in memory.items()}
    hours = plan["tokens"] * (8 * total + 16 * 512 * 64 * 4) / (0.4 * 312e12 * 3600)
    assert plan["gpu"]["hours"]["full"] == pytest.approx(hours, rel=0.01)
    assert plan["gpu"]["gpus_for_memory"] == {"full": 1, "lora": 1, "qlora": 1}


def test_the_answer_is_one_json_object_with_the_promised_keys(verdict_of):
    for config in (llama(), kind("t5", "T5ForConditionalGeneration"), kind("jamba", "JambaForCausalLM"), b"[]"):
        answer = json.loads(json.dumps(verdict_of(config).to_dict(), allow_nan=False))
        wanted = {"verdict", "reasons", "capabilities", "text_only", "inferred", "weights", "mask_token", "plan"}
        assert wanted <= set(answer)
        assert {"present", "format", "shards", "bytes", "download"} <= set(answer["weights"])
        assert {"strategy", "id"} <= set(answer["mask_token"])
        assert (answer["plan"] is None) == (answer["verdict"] == "unsupported")
