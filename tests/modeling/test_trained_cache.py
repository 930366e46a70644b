"""Exact decoding on a model that has learned something: a real checkpoint, trained for a moment as BD3LM."""

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
from a2d_hf.trainers import BD3LMConfig, BD3LMTrainer
from tests.modeling.test_block_cache import assert_same


pytestmark = [pytest.mark.real_data, pytest.mark.slow]
PROMPTS = ["Once upon a time, there was a little girl named Lily.", "Tom", "The dog was sad because"]


@pytest.fixture(scope="module", params=["block", "causal"])
def trained(request, real_data, tmp_path_factory):
    """stories260K after 60 steps of 8 rows; how far the loss fell is checked, or nothing would have been learned."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(real_data / "models" / "stories260K")
    text = (real_data / "corpora" / "tinystories_train.txt").read_text(encoding="utf-8")[:100_000]
    rows = datasets.Dataset.from_list([{"text": text[i : i + 250]} for i in range(0, len(text), 250)])
    model = A2DForMaskedDiffusion.from_pretrained(
        real_data / "models" / "stories260K", tokenizer=tokenizer, objective="bd3lm", block_size=8,
        clean_context=request.param,
    )  # fmt: skip
    args = BD3LMConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), max_steps=60, per_device_train_batch_size=8, max_length=128,
        learning_rate=2e-3, insert_eos=False, ar_loss_weight=0.5 if request.param == "causal" else 0.0,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = BD3LMTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    nelbo = [entry["nelbo"] for entry in trainer.state.log_history if "nelbo" in entry]
    assert nelbo[-1] < nelbo[0] - 0.5
    model.eval()
    model.generation_config = A2DGenerationConfig(eos_token_id=2, pad_token_id=2, bos_token_id=1)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    return model, tokenizer(PROMPTS, return_tensors="pt", padding=True)


@pytest.mark.parametrize("selector", ["confidence", "threshold"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_cached_and_uncached_logits_agree_at_every_commit(trained, dtype, tolerance, selector, monkeypatch):
    model, inputs = trained
    model.to(dtype)
    steps = {"steps": 24} if selector == "confidence" else {"threshold": 0.5}
    assert_same(model, monkeypatch, inputs, tolerance, max_new_tokens=48, selector=selector, **steps)


def test_self_speculation_writes_what_the_causal_mode_writes(trained):
    model, inputs = trained
    model.to(torch.float32)
    arguments = {"max_new_tokens": 64, "eos_token_id": None}
    output = model.diffusion_generate(**inputs, self_speculation="causal", return_dict_in_generate=True, **arguments)
    suppressed = [model.config.mask_token_id]
    own = model.backbone.generate(**inputs, do_sample=False, suppress_tokens=suppressed, pad_token_id=2, **arguments)
    assert torch.equal(output.sequences, own)
    # Some drafts stood: two forwards wrote more than one token on average, somewhere.
    assert float(output.tokens_per_forward.max()) > 0.55
