"""Adapters beyond plain LoRA: what PEFT offers trains, saves, reloads and merges, or is refused with its reason."""

import datasets
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from a2d_hf.modeling import A2DConfig, A2DForMaskedDiffusion
from a2d_hf.trainers import MDLMTrainer
from a2d_hf.trainers.model_resolution import add_adapter
from tests.conftest import tiny_model, tiny_tokenizer
from tests.trainers.helpers import MASK_ID, config, diffusion_model, trainer


TEXTS = datasets.Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 12)
LINEAR = ["q_proj", "v_proj", "down_proj"]
METHODS = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM"),
    "rslora": lambda: LoraConfig(task_type="CAUSAL_LM", use_rslora=True),
    "dora": lambda: LoraConfig(task_type="CAUSAL_LM", use_dora=True),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=LINEAR),
    "oft": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=LINEAR, oft_block_size=4),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"]),
    "ln_tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "tokens": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[MASK_ID]),
}


def masked_ids(mask_id=MASK_ID) -> torch.Tensor:
    ids = torch.randint(3, 110, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, [2, 5]] = mask_id
    return ids


def save_base(folder):
    model = diffusion_model()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return A2DForMaskedDiffusion.from_pretrained(folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_trains_reloads_switches_off_and_merges(method, tmp_path):
    """Through the class that people use, from a folder, against the logits of the trained object."""
    run = trainer(
        tmp_path, save_base(tmp_path / "base"), peft_config=METHODS[method](), max_steps=4, learning_rate=1e-2
    )
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    with torch.enable_grad():
        run.train()
    for name, weight in run.model.named_parameters():
        assert weight.requires_grad != torch.equal(before[name], weight), name
    run.save_model(str(tmp_path / "adapter"))
    fresh, ids = A2DForMaskedDiffusion.from_pretrained(tmp_path / "base").eval(), masked_ids()
    untrained, trained = fresh(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits
    assert (trained - untrained).abs().max() > 1e-3
    with run.model.disable_adapter():
        torch.testing.assert_close(run.model(input_ids=ids).logits, untrained, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, trained, rtol=0, atol=0)
    drafted = loaded.diffusion_generate(ids[:1, :2], max_new_tokens=4)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, A2DForMaskedDiffusion)
    torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=0, atol=1e-4)
    assert torch.equal(merged.diffusion_generate(ids[:1, :2], max_new_tokens=4), drafted)
    merged.save_pretrained(tmp_path / "merged")
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # needs our class, which importing registers
    torch.testing.assert_close(parent.eval()(input_ids=ids).logits, trained, rtol=0, atol=1e-4)


REFUSED = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    "POLY": lambda: peft.PolyConfig(task_type="CAUSAL_LM", target_modules=LINEAR),
    "XLORA": lambda: peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_work_is_refused_with_its_reason(method, tmp_path):
    with pytest.raises(ValueError, match=f"^{method} cannot work here: .*; use LoRA or another adapter"):
        trainer(tmp_path, peft_config=REFUSED[method]())


def test_an_adapter_that_leaves_the_mask_row_alone_says_so(tmp_path, caplog):
    import logging

    logger = logging.getLogger("a2d_hf.trainers.model_resolution")
    logger.addHandler(caplog.handler)
    for method, told in (("lora", False), ("tokens", False), ("ia3", True)):
        caplog.clear()
        trainer(tmp_path, save_base(tmp_path / method), peft_config=METHODS[method]())
        assert ("does not train the mask token's embedding row" in caplog.text) is told
    logger.removeHandler(caplog.handler)


# ------------------------------------------------------------------------------------------------------ 4-bit weights

pytest.importorskip("bitsandbytes", reason="QLoRA needs the `quantization` extra")


def nf4(compute=torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


@pytest.fixture
def wide_checkpoint(tmp_path):
    """An autoregressive checkpoint that is wide enough for blocks of 64 weights."""
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "ar")
    tiny_tokenizer().save_pretrained(tmp_path / "ar")
    return tmp_path / "ar"


def qlora(folder, tmp_path, dora=False, **fields) -> MDLMTrainer:
    return MDLMTrainer(
        str(folder),
        config(tmp_path, learning_rate=1e-2, **{"max_steps": 4} | fields),
        train_dataset=TEXTS,
        eval_dataset=TEXTS,
        quantization_config=nf4(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", use_dora=dora),
    )


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_qlora_trains_saves_reloads_and_merges_into_a_fresh_base(dora, wide_checkpoint, tmp_path):
    run = qlora(wide_checkpoint, tmp_path, dora)
    base = run.model.get_base_model()
    assert type(base.get_output_embeddings()) is torch.nn.Linear  # the head is not quantised
    assert {w.dtype for n, w in base.named_parameters() if "base_layer" in n and "embed" not in n} == {torch.uint8}
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    with torch.enable_grad():
        run.train()
    for name, weight in run.model.named_parameters():
        assert weight.requires_grad != torch.equal(before[name], weight), name
    run.save_model(str(tmp_path / "adapter"))
    ids = masked_ids(run.model.config.mask_token_id)
    trained = run.model.eval()(input_ids=ids).logits

    # The same quantised base, loaded anew.
    quantized = A2DForMaskedDiffusion.from_pretrained(
        wide_checkpoint, tokenizer=tiny_tokenizer(), quantization_config=nf4(), dtype=torch.float32
    )
    add_adapter(quantized, None, None, run.args)  # keeps its layout, as a trainer does
    loaded = PeftModel.from_pretrained(quantized, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, trained, rtol=0, atol=1e-5)

    # A base that never was quantised: the adapter merges into it to the last digits.
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.25)):
        fresh = A2DForMaskedDiffusion.from_pretrained(wide_checkpoint, tokenizer=tiny_tokenizer(), dtype=dtype)
        adapted = PeftModel.from_pretrained(fresh.eval(), tmp_path / "adapter").eval()
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_parameters())
        assert {weight.dtype for weight in merged.parameters()} == {dtype}
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=tolerance)


def test_qlora_still_has_gradients_after_an_evaluation(wide_checkpoint, tmp_path):
    """On some CPUs a pass in eval mode repacks 4-bit weights for good, and no gradient passes them afterwards."""
    run = qlora(wide_checkpoint, tmp_path)
    run.evaluate()
    before = {name: weight.clone() for name, weight in run.model.named_parameters() if weight.requires_grad}
    run.train()
    assert all(not torch.equal(before[n], w) for n, w in run.model.named_parameters() if n in before)


# ------------------------------------------------------------------------------------------------- a published count


def llama_3_2_1b():
    """The public configuration of Llama-3.2-1B, as far as it decides shapes."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    )


@pytest.mark.parametrize("train_mask_row", [False, True])
def test_attention_lora_of_llama_3_2_1b_has_the_published_number_of_parameters(train_mask_row):
    """1,703,936 of 1,237,520,384 in all, with one grown row: a base of 1,235,814,400 and 2,048 for the row."""
    with torch.device("meta"):
        parent = AutoModelForCausalLM.from_config(llama_3_2_1b())
    assert parent.num_parameters() == 1_235_814_400
    parent.resize_token_embeddings(128257, mean_resizing=False)
    model = A2DForMaskedDiffusion(A2DConfig(text_config=parent.config, mask_token_id=128256), backbone=parent)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        trainable_token_indices=[128256] if train_mask_row else None,
    )
    with torch.device("meta"):
        adapted = get_peft_model(model, adapter)
    trainable, total = adapted.get_nb_trainable_parameters()
    mask_row = 2048 if train_mask_row else 0
    assert trainable == 1_703_936 + mask_row
    assert total == 1_237_520_384 + mask_row
