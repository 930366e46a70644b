"""Runs a recipe as `accelerate launch` starts it, and writes down what each process was part of.

    accelerate launch --config_file recipes/accelerate_configs/X.yaml -m tests.launched_recipe TOLD recipes/Y.py ...

leaves TOLD/rank-N.json. accelerate turns processes into sharding ones only where they are called GPUs: under
an FSDP configuration the processes of the CPU are called so here. All that follows, `fully_shard` over gloo, is real.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


own_init, own_train = PartialState.__init__, transformers.Trainer.train


def sharded_on_cpu(self, *args, **kwargs) -> None:
    own_init(self, *args, **kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type is DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def told_train(self, *args, **kwargs):
    before = {name: _whole(tensor) for name, tensor in self.model.named_parameters()}
    result = own_train(self, *args, **kwargs)
    parameters = dict(self.model_wrapped.named_parameters())
    after = {name.removeprefix("module."): _whole(tensor) for name, tensor in parameters.items()}
    state = self.accelerator.state
    group = torch.distributed.is_initialized()
    told = {
        "distributed_type": str(state.distributed_type).removeprefix("DistributedType."),
        "processes": state.num_processes,
        "world_size": torch.distributed.get_world_size() if group else 1,
        "backend": torch.distributed.get_backend() if group else None,
        "mixed_precision": self.accelerator.mixed_precision,
        "sharded": sum(isinstance(tensor, DTensor) for tensor in parameters.values()),
        "parameters": len(parameters),
        "still": [name for name in before if torch.equal(before[name], after[name])],
        "steps": self.state.global_step,
        "losses": [entry["loss"] for entry in self.state.log_history if "loss" in entry],
    }
    (TOLD / f"rank-{state.process_index}.json").write_text(json.dumps(told))
    return result


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


if __name__ == "__main__":
    TOLD = Path(sys.argv[1])
    TOLD.mkdir(parents=True, exist_ok=True)
    PartialState.__init__, transformers.Trainer.train = sharded_on_cpu, told_train
    sys.argv = sys.argv[2:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
