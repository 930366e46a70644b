"""A training run for tests that need processes of their own: killed ones, and several at once.

    python -m tests.trainers.run_training OUT '[{"max_steps": 4}, {"max_steps": 5}]'

trains one run after the other, in OUT/0, OUT/1, ...
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from a2d_hf.trainers import (
    A2DTrainer,
    BD3LMConfig,
    BD3LMTrainer,
    MDLMConfig,
    MDLMTrainer,
    RepAlignConfig,
    RepAlignTrainer,
)
from a2d_hf.trainers.checkpointed_trainer import CheckpointedTrainer
from tests.trainers.helpers import diffusion_model, token_rows


TRAINERS = {
    "mdlm": (MDLMTrainer, MDLMConfig, {}),
    "bd3lm": (BD3LMTrainer, BD3LMConfig, {"objective": "bd3lm", "block_size": 4}),
    "repalign": (RepAlignTrainer, RepAlignConfig, {}),
}


def kill_inside_the_checkpoint_of(step: int) -> None:
    """From now on, saving that checkpoint ends the process like a power cut: half a file, and nothing after it."""

    def half_a_file(self, output_dir):
        if self.state.global_step == step:
            Path(output_dir, "optimizer.pt").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, output_dir)

    original = CheckpointedTrainer._save_optimizer_and_scheduler
    CheckpointedTrainer._save_optimizer_and_scheduler = half_a_file


def train(out: Path, fields: dict) -> A2DTrainer:
    """One run. Leaves final.safetensors (main process) and what it did, told-RANK.json, in `out`."""
    options = {"family": "gpt2", "rows": 21, "kill_at": None, "evaluate": False, "trainer": "mdlm"}
    options |= {name: fields.pop(name) for name in list(fields) if name in options}
    if options["kill_at"] is not None:
        kill_inside_the_checkpoint_of(options["kill_at"])
    trainer_class, config_class, converted = TRAINERS[options["trainer"]]
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_length": 64}
    args = config_class(output_dir=str(out / "run"), **quiet | fields)
    rows, held_out = token_rows(options["rows"]), token_rows(7, seed=1)
    model = diffusion_model(options["family"], **converted)
    run = trainer_class(model, args, train_dataset=rows, eval_dataset=held_out)
    seen = []
    compute_loss = run.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append(inputs["row_id"].tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    run.compute_loss = spy
    run.train()
    run.compute_loss = compute_loss
    told = {
        "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "nelbo": [entry["nelbo"] for entry in run.state.log_history if "nelbo" in entry],
        "rows": seen,
        "eval": run.evaluate() if options["evaluate"] else None,
        "num_tokens": run.state.num_input_tokens_seen,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"told-{run.accelerator.process_index}.json").write_text(json.dumps(told))
    if run.is_world_process_zero():
        save_file(
            {name: t.contiguous().clone() for name, t in run.model.state_dict().items()}, out / "final.safetensors"
        )
    return run


if __name__ == "__main__":
    for i, one_run in enumerate(json.loads(sys.argv[2])):
        train(Path(sys.argv[1]) / str(i), one_run)
    if torch.distributed.is_initialized():
        # Left to the interpreter's exit, gloo's threads now and then end a process that has done all its work.
        torch.distributed.destroy_process_group()
