"""Two real processes train what one trains: same rows, same noise, same divisor, same weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.trainers.run_training import train


# 21 rows: the last step of an epoch has 5 of 8, so two processes need rows that one does not have.
RUN = {
    "family": "llama",
    "rows": 21,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "evaluate": True,
    "per_device_eval_batch_size": 2,
}


TWO_PROCESSES = {
    "4 rows each": {"per_device_train_batch_size": 4},
    "2 rows each, twice": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "masked": {"per_device_train_batch_size": 4, "loss_normalization": "masked"},
    "tied": {"per_device_train_batch_size": 4, "family": "qwen3"},
    "replay": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "replay_weight": 0.5},
    "packed": {"per_device_train_batch_size": 2, "packing": True, "max_length": 24},
    "bd3lm, packed": {"per_device_train_batch_size": 2, "packing": True, "max_length": 24, "trainer": "bd3lm"},
    "bd3lm, in shares": {
        "per_device_train_batch_size": 2,
        "trainer": "bd3lm",
        "steps_per_row": 2,
        "nested_views": 4,
        "teacher_targets": True,
    },
    "repalign, packed": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "packing": True,
        "max_length": 24,
        "trainer": "repalign",
    },
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All runs of two processes, under one torchrun: starting it costs more than the runs."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.trainers.run_training", str(out), json.dumps([RUN | f for f in TWO_PROCESSES.values()])]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: out / str(i) for i, name in enumerate(TWO_PROCESSES)}


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_equal_one(name, two_processes, tmp_path):
    fields = {k: v for k, v in TWO_PROCESSES[name].items() if k != "gradient_accumulation_steps"}
    rows = 2 * fields["per_device_train_batch_size"] * TWO_PROCESSES[name].get("gradient_accumulation_steps", 1)
    one = train(tmp_path, RUN | fields | {"per_device_train_batch_size": rows})
    told = json.loads((tmp_path / "told-0.json").read_text())
    both_told = [json.loads((two_processes[name] / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert told["processes"] == 1 and [entry["processes"] for entry in both_told] == [2, 2]

    both = load_file(two_processes[name] / "final.safetensors")
    for parameter, tensor in one.model.state_dict().items():
        torch.testing.assert_close(both[parameter], tensor, rtol=1e-4, atol=1e-5, msg=parameter)
    assert len(told["losses"]) > 2
    if TWO_PROCESSES[name].get("packing"):
        assert any(len(batch) > fields["per_device_train_batch_size"] for batch in both_told[0]["rows"])
    for entry in both_told:
        assert entry["losses"] == pytest.approx(told["losses"], rel=1e-4)
        assert entry["nelbo"] == pytest.approx(told["nelbo"], rel=1e-4)
        assert entry["num_tokens"] == told["num_tokens"]
        for metric in ("eval_loss", "eval_nelbo", "eval_masked_accuracy"):
            assert entry["eval"][metric] == pytest.approx(told["eval"][metric], rel=1e-4)


def test_two_processes_share_the_rows_of_an_epoch(two_processes):
    """Every row is seen once in an epoch by one of them, and the short last batch is filled with blank rows (-1)."""
    told = [json.loads((two_processes["4 rows each"] / f"told-{rank}.json").read_text()) for rank in range(2)]
    rows = [row for entry in told for batch in entry["rows"] for row in batch]
    assert sorted(row for row in rows if row >= 0) == sorted(list(range(21)) * 2)
    assert len(rows) == 2 * 24
    assert not set(told[0]["rows"][0]) & set(told[1]["rows"][0])
