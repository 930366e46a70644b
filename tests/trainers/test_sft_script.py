"""A script written for SFTTrainer needs the names of trainer and config changed, and nothing else."""

import json

import pytest
import trl
from trl.scripts import sft

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.trainers import BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer, RepAlignConfig, RepAlignTrainer


ROWS = {
    "text": {"text": "the quick brown fox jumps over the lazy dog"},
    "prompt": {"prompt": "question: 1 + 1 = ? answer:", "completion": " 2"},
}


TRAINERS = {
    "mdlm": (MDLMTrainer, MDLMConfig),
    "bd3lm": (BD3LMTrainer, BD3LMConfig),
    "repalign": (RepAlignTrainer, RepAlignConfig),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("options", [[], ["--use_peft", "--lora_r", "4"]], ids=["full", "lora"])
def test_the_script_of_trl_runs_after_two_substitutions(
    trainer, kind, options, make_checkpoint, tmp_path, monkeypatch
):
    for name, ours in zip(("SFTTrainer", "SFTConfig"), TRAINERS[trainer], strict=True):
        monkeypatch.setattr(trl, name, ours)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text((json.dumps(ROWS[kind]) + "\n") * 12)
    arguments = ["--model_name_or_path", str(make_checkpoint("llama")), "--dataset_name", str(data)]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--learning_rate", "1e-3", "--use_cpu"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_train_batch_size", "4"]
    arguments += ["--report_to", "none", "--max_length", "64", *options]
    sft.main(*sft.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False))
    if not options:
        objective = A2DForMaskedDiffusion.from_pretrained(tmp_path / "out").config.objective
        assert objective == TRAINERS[trainer][0].objective
    else:
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_help_of_every_argument_can_be_printed(capsys):
    """A stray % in a help text breaks --help of every script."""
    with pytest.raises(SystemExit) as end:
        trl.TrlParser((MDLMConfig,)).parse_args_and_config(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name in ("--noise_schedule", "--max_eos_tail", "--truncation_mode", "--eval_noise_seed"):
        assert name in printed
