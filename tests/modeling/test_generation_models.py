"""Decoding with tiny random transformers models: batches, blocks, shift, saving, PEFT, pipelines, streaming."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, TextDiffusionStreamer, TextIteratorStreamer, pipeline
from transformers.utils.logging import warning_once

from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
from a2d_hf.modeling.attention_pattern import AttentionPattern
from tests.conftest import FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer


MASK = VOCAB_SIZE - 1
BD3LM = {"objective": "bd3lm", "block_size": 4}


def diffusion_model(family: str = "llama", **fields) -> A2DForMaskedDiffusion:
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model(family), mask_token_id=MASK, **fields)
    model.generation_config = A2DGenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, MASK, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 2), torch.zeros((len(rows), width), dtype=torch.long)
    for row, prompt in enumerate(rows):
        columns = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fields", [{}, BD3LM, {"token_shift": True}, BD3LM | {"token_shift": True}, BD3LM | {"clean_context": "causal"}],
    ids=["mdlm", "bd3lm", "mdlm-shift", "bd3lm-shift", "bd3lm-causal-context"],
)  # fmt: skip
def test_a_row_in_a_batch_gets_the_tokens_it_gets_alone(family, fields):
    model, rows = diffusion_model(family, **fields), prompts(1, 3, 4, 5, 9)
    arguments = {"max_new_tokens": 7, "steps": 5, "eos_token_id": None}
    alone = [model.diffusion_generate(row[None], **arguments)[0, len(row) :].tolist() for row in rows]
    for side in ("left", "right"):
        together = model.diffusion_generate(**padded(rows, side), **arguments)
        assert together[:, 9:].tolist() == alone


def reference_decode(model, prompt: list[int], new: int, block: int, logits_of) -> list[int]:
    """One row, one token per forward, the surest first, block after block; nothing left off, nothing batched."""
    row = prompt + [MASK] * new
    while MASK in row:
        first = row.index(MASK) // block
        here = [i for i, token in enumerate(row) if token == MASK and i // block == first]
        logits = logits_of(row).clone()
        logits[:, MASK] = -torch.inf
        probability, token = logits.softmax(-1).max(-1)
        best = max(here, key=lambda i: float(probability[i]))
        row[best] = int(token[best])
    return row


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("shift", [False, True])
def test_bd3lm_blocks_agree_with_a_plain_loop(length, shift):
    model, (prompt,) = diffusion_model(**BD3LM, token_shift=shift), prompts(length)

    @torch.no_grad()
    def logits_of(row):
        return model(torch.tensor([row]), attention_pattern=AttentionPattern.block_causal(4)).logits[0]

    ours = model.diffusion_generate(prompt[None], max_new_tokens=10, eos_token_id=None)
    assert ours[0].tolist() == reference_decode(model, prompt.tolist(), 10, 4, logits_of)


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("shift", [False, True])
def test_a_causal_clean_context_is_decoded_under_the_training_pattern(length, shift):
    fields = BD3LM | {"clean_context": "causal", "token_shift": shift}
    model, (prompt,) = diffusion_model(**fields), prompts(length)

    @torch.no_grad()
    def logits_of(row):
        pattern = AttentionPattern.bd3lm(4, clean_context="causal")
        return model(torch.tensor([row + row]), attention_pattern=pattern).logits[0, : len(row)]

    ours = model.diffusion_generate(prompt[None], max_new_tokens=10, eos_token_id=None)
    assert ours[0].tolist() == reference_decode(model, prompt.tolist(), 10, 4, logits_of)
    block = diffusion_model(**BD3LM, token_shift=shift)
    assert not torch.equal(ours, block.diffusion_generate(prompt[None], max_new_tokens=10, eos_token_id=None))


@pytest.mark.parametrize("shift", [False, True])
def test_mdlm_agrees_with_a_plain_loop(shift):
    model, (prompt,) = diffusion_model(token_shift=shift), prompts(5)

    @torch.no_grad()
    def logits_of(row):
        return model(torch.tensor([row])).logits[0]

    for block in (None, 4):
        ours = model.diffusion_generate(prompt[None], max_new_tokens=10, block_size=block, eos_token_id=None)
        assert ours[0].tolist() == reference_decode(model, prompt.tolist(), 10, block or 99, logits_of)


def test_sub_blocks_keep_the_attention_of_the_trained_block():
    model, (prompt,) = diffusion_model(objective="bd3lm", block_size=8), prompts(3)

    @torch.no_grad()
    def logits_of(row):
        return model(torch.tensor([row]), attention_pattern=AttentionPattern.block_causal(8)).logits[0]

    ours = model.diffusion_generate(prompt[None], max_new_tokens=13, block_size=2, eos_token_id=None)
    assert ours[0].tolist() == reference_decode(model, prompt.tolist(), 13, 2, logits_of)


def test_a_block_size_off_the_trained_grid_warns_and_changes_the_attention(caplog):
    warning_once.cache_clear()
    model, (prompt,) = diffusion_model(**BD3LM), prompts(3)

    @torch.no_grad()
    def logits_of(row):
        return model(torch.tensor([row]), attention_pattern=AttentionPattern.block_causal(6)).logits[0]

    ours = model.diffusion_generate(prompt[None], max_new_tokens=11, block_size=6, eos_token_id=None)
    assert ours[0].tolist() == reference_decode(model, prompt.tolist(), 11, 6, logits_of)
    assert "trained with blocks of 4 tokens" in caplog.text


def test_infilling_in_a_bd3lm_row_is_the_same_in_a_batch():
    model, (row,) = diffusion_model(**BD3LM), prompts(12)
    row[[2, 3, 9]] = MASK
    alone = model.diffusion_generate(row[None], max_new_tokens=0)
    assert (alone[0] == MASK).sum() == 0 and torch.equal(alone[0][row != MASK], row[row != MASK])
    # The second row is the first without its last block, which the blocks before it never see.
    together = model.diffusion_generate(**padded([row, row[:8]], "left"), max_new_tokens=0)
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1, 4:], alone[0, :8])


def test_sdpa_and_eager_decode_the_same_text():
    ids = prompts(6)[0][None]
    texts = []
    for implementation in ("sdpa", "eager"):
        parent = tiny_model("llama", attn_implementation=implementation)
        model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK, **BD3LM)
        texts.append(model.generate(ids, max_new_tokens=12, eos_token_id=None).tolist())
    assert texts[0] == texts[1]


def test_the_parent_would_decode_something_else():
    # Not a coincidence of tiny weights: left to right, the parent's own generate gives another text.
    ids = prompts(6)[0][None]
    parent = tiny_model("llama").generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert not torch.equal(parent, diffusion_model().generate(ids, max_new_tokens=8, eos_token_id=None))


# ---------------------------------------------------------------------------------------------------- the ecosystem


def test_generation_defaults_travel_with_the_checkpoint(tmp_path):
    model = diffusion_model()
    model.generation_config.update(steps=3, selector="margin", max_new_tokens=6)
    model.save_pretrained(tmp_path)
    for loaded in (A2DForMaskedDiffusion.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(loaded.generation_config, A2DGenerationConfig)
        assert loaded.generation_config == model.generation_config
        output = loaded.diffusion_generate(prompts(4)[0][None], return_dict_in_generate=True)
        assert output.num_forwards <= 3 and output.sequences.shape[1] <= 10


def test_a_config_passed_to_from_pretrained_is_taken(tmp_path):
    diffusion_model().save_pretrained(tmp_path)
    given = GenerationConfig(max_new_tokens=5, eos_token_id=2)
    loaded = A2DForMaskedDiffusion.from_pretrained(tmp_path, generation_config=given)
    assert loaded.generation_config.max_new_tokens == 5 and loaded.generation_config.eos_token_id == 2


def test_a_fresh_conversion_has_decoding_defaults(make_checkpoint):
    wrapped = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK)
    for model in (A2DForMaskedDiffusion.from_pretrained(make_checkpoint("llama")), wrapped):
        assert isinstance(model.generation_config, A2DGenerationConfig)
        assert (model.generation_config.eos_token_id, model.generation_config.selector) == (2, "confidence")


def test_generate_goes_the_same_way_with_the_calls_of_trl_and_lm_eval():
    model, ids = diffusion_model(), prompts(4)[0][None]
    ours = model.diffusion_generate(ids, max_new_tokens=6)
    assert torch.equal(model.generate(ids, max_new_tokens=6), ours)
    given = GenerationConfig(max_new_tokens=6, do_sample=False)
    assert torch.equal(
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=given), ours
    )
    assert torch.equal(model.generate(input_ids=ids, max_length=10, use_cache=True, pad_token_id=0), ours)


def test_a_peft_model_decodes_with_its_adapter_on_and_off():
    model, ids = diffusion_model(), prompts(4)[0][None]
    plain = model.generate(ids, max_new_tokens=8)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(peft.generate(input_ids=ids, max_new_tokens=8), plain)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = peft.generate(input_ids=ids, max_new_tokens=8)
    assert not torch.equal(adapted, plain) and torch.equal(peft.diffusion_generate(ids, max_new_tokens=8), adapted)
    with peft.disable_adapter():
        assert torch.equal(peft.generate(input_ids=ids, max_new_tokens=8), plain)


def test_the_text_generation_pipeline_works():
    tokenizer = tiny_tokenizer()
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (result,) = generate("The quick brown", max_new_tokens=6, do_sample=False)
    assert result["generated_text"].startswith("The quick brown") and len(result["generated_text"]) > 15
    batch = generate(["The quick", "A model reads from left"], max_new_tokens=4, batch_size=2, do_sample=False)
    assert [row[0]["generated_text"][:3] for row in batch] == ["The", "A m"]


def test_the_pipeline_and_a_streamer_work_from_the_folder_of_a_checkpoint(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer, **BD3LM)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert isinstance(generate.model, A2DForMaskedDiffusion)
    ids = tokenizer("The quick brown", return_tensors="pt").input_ids
    row = model.diffusion_generate(ids, max_new_tokens=6)[0]
    streamer = TextDiffusionStreamer(generate.tokenizer, skip_special_tokens=True)
    greedy = {"max_new_tokens": 6, "do_sample": False}  # the pipeline samples at 0.7 by itself
    (result,) = generate("The quick brown", streamer=streamer, **greedy)
    text = tokenizer.decode(row, skip_special_tokens=True)
    without_drafts = re.sub("\0337.*?\0338\033\\[J", "", capsys.readouterr().out, flags=re.S)
    assert result["generated_text"] == text and without_drafts.endswith(f"{text}\n")
    (result,) = generate([{"role": "user", "content": "The quick brown"}], **greedy)
    assert result["generated_text"][-1] == {"role": "assistant", "content": text[len("The quick brown") :]}


def test_stop_strings_end_a_row_where_they_appear():
    tokenizer = tiny_tokenizer()
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer)
    ids = tokenizer("The quick", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=12, eos_token_id=None)
    stop = tokenizer.decode(plain[0, ids.shape[1] + 3])
    output = model.generate(
        ids,
        max_new_tokens=12,
        eos_token_id=None,
        stop_strings=[stop],
        tokenizer=tokenizer,
        return_dict_in_generate=True,
    )
    stopped = output.sequences[0, ids.shape[1] :].tolist()
    assert output.stop_reason == ["stopping_criteria"] and len(stopped) <= 4
    assert stopped == plain[0, ids.shape[1] : ids.shape[1] + len(stopped)].tolist()
    assert stop in tokenizer.decode(stopped[-1:])


# --------------------------------------------------------------------------------------------------------- streaming


class RecordingStreamer:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.flatten().tolist()))

    def put_draft(self, value):
        self.events.append(("draft", value.flatten().tolist()))

    def end(self):
        self.events.append(("end", None))


@pytest.mark.parametrize("fields", [{}, BD3LM], ids=["mdlm", "bd3lm"])
def test_a_streamer_gets_the_prompt_the_drafts_and_the_blocks_in_order(fields):
    model, (prompt,), streamer = diffusion_model(**fields), prompts(5), RecordingStreamer()
    out = model.generate(prompt[None], max_new_tokens=9, eos_token_id=None, streamer=streamer)
    puts = [tokens for kind, tokens in streamer.events if kind == "put"]
    drafts = [tokens for kind, tokens in streamer.events if kind == "draft"]
    assert puts[0] == prompt.tolist() and sum(puts[1:], []) == out[0, 5:].tolist()
    assert [len(tokens) for tokens in puts[1:]] == ([3, 4, 2] if fields else [9])
    assert len(drafts) == 9 and not any(MASK in tokens for tokens in drafts)
    assert [len(tokens) for tokens in drafts] == ([3] * 3 + [4] * 4 + [2] * 2 if fields else [9] * 9)
    assert streamer.events[-1][0] == "end" and sum(kind == "end" for kind, _ in streamer.events) == 1


def test_a_stream_ends_with_the_eos_token():
    model, (prompt,), streamer = diffusion_model(), prompts(5), RecordingStreamer()
    plain = model.generate(prompt[None], max_new_tokens=9, eos_token_id=None, block_size=1)
    out = model.generate(
        prompt[None], max_new_tokens=9, eos_token_id=int(plain[0, 8]), block_size=1, streamer=streamer
    )
    puts = [tokens for kind, tokens in streamer.events if kind == "put"]
    assert sum(puts[1:], []) == out[0, 5:].tolist() == plain[0, 5 : 5 + len(out[0, 5:])].tolist()


def test_an_infilled_row_is_streamed_whole():
    model, (prompt,), streamer = diffusion_model(), prompts(6), RecordingStreamer()
    prompt[2:4] = MASK
    out = model.generate(prompt[None], max_new_tokens=0, streamer=streamer)
    assert [tokens for kind, tokens in streamer.events if kind == "put"] == [prompt.tolist(), out[0].tolist()]


def test_the_librarys_diffusion_streamer_prints_drafts_and_text(capsys):
    tokenizer = tiny_tokenizer()
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer)
    ids = tokenizer("The quick", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=6, eos_token_id=None, streamer=TextDiffusionStreamer(tokenizer))
    printed = capsys.readouterr().out
    assert "\033[33m" in printed and printed.endswith("\n")
    assert tokenizer.decode(out[0])[-3:] in printed


def test_the_librarys_text_iterator_gets_all_of_the_text():
    tokenizer = tiny_tokenizer()
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer, **BD3LM)
    ids, streamer = tokenizer("The quick", return_tensors="pt").input_ids, TextIteratorStreamer(tokenizer)
    out = model.generate(ids, max_new_tokens=9, eos_token_id=None, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0])


def test_a_streamer_takes_one_row():
    with pytest.raises(ValueError, match="`streamer` takes one row"):
        diffusion_model().generate(torch.stack(prompts(4, 4)), max_new_tokens=2, streamer=RecordingStreamer())
