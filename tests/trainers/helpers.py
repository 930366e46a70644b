"""Small runs: a tiny diffusion model, rows of token ids, a trainer around them."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.trainers import A2DTrainer, BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer
from tests.conftest import tiny_model


MASK_ID = 120


def diffusion_model(family="llama", seed=0, **fields) -> A2DForMaskedDiffusion:
    return A2DForMaskedDiffusion.from_causal_lm(tiny_model(family, seed=seed), mask_token_id=MASK_ID, **fields)


def token_rows(count, longest=12, prompts=True, seed=0) -> datasets.Dataset:
    """Rows of random tokens of different lengths, every second one with a prompt that is no target."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(3, longest + 1, (1,), generator=generator))
        input_ids = torch.randint(3, 110, (length,), generator=generator).tolist()
        prompt = length // 3 if prompts and i % 2 else 0
        rows.append({"input_ids": input_ids, "labels": [-100] * prompt + input_ids[prompt:]})
    return datasets.Dataset.from_list(rows)


def config(tmp_path, **fields) -> MDLMConfig:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_length": 64, "use_cpu": True}
    return MDLMConfig(output_dir=str(tmp_path / "run"), **quiet | fields)


def trainer(tmp_path, model=None, rows=None, **fields) -> MDLMTrainer:
    arguments = {name: fields.pop(name) for name in ("peft_config", "processing_class", "callbacks") if name in fields}
    return MDLMTrainer(
        diffusion_model() if model is None else model,
        config(tmp_path, **fields),
        train_dataset=token_rows(16) if rows is None else rows,
        **arguments,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def first_batch(run: MDLMTrainer) -> dict[str, torch.Tensor]:
    return next(iter(run.get_train_dataloader()))


def bd3lm_trainer(tmp_path, model=None, rows=None, block_size=4, eval_dataset=None, **fields) -> BD3LMTrainer:
    """A BD3LM trainer; the model's fields are those of `model`, or `token_shift` and `clean_context`."""
    converted = {name: fields.pop(name) for name in ("token_shift", "clean_context") if name in fields}
    arguments = {name: fields.pop(name) for name in ("peft_config", "processing_class", "callbacks") if name in fields}
    if model is None:
        model = diffusion_model(objective="bd3lm", block_size=block_size, **converted)
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_length": 64, "use_cpu": True}
    return BD3LMTrainer(
        model,
        BD3LMConfig(output_dir=str(tmp_path / "run"), **quiet | fields),
        train_dataset=token_rows(16) if rows is None else rows,
        eval_dataset=eval_dataset,
        **arguments,
    )


def padded_left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with its padding moved from the right to the left."""
    left = dict(batch)
    for name in ("input_ids", "labels", "attention_mask"):
        pairs = zip(batch[name], batch["attention_mask"], strict=True)
        left[name] = torch.stack([row.roll(int((1 - real).sum())) for row, real in pairs])
    return left


def assert_resumes(make: Callable[..., A2DTrainer], tmp_path: Path) -> A2DTrainer:
    """A run that goes on at its second step ends where an unbroken one does, which comes back."""
    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = weights(whole.model)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(resumed.model).items())
    return whole


def assert_refuses_to_resume(other: A2DTrainer, tmp_path: Path, told: str) -> None:
    """A run with other settings names them, and does not go on from that checkpoint."""
    with pytest.raises(ValueError, match=told):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
