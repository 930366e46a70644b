"""Where a checkpoint comes from: what its manifest says, and with what it was made.

Owns the content of `a2d_manifest.json`, which travels with a checkpoint. It holds no time, no path and nothing of the
machine, so that the same conversion of the same files gives the same bytes.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import __version__
from .run_directory import SCHEMA_VERSION


LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "safetensors", "trl")
# What only says where files lay or which machine was at work.
_LOCAL_SETTINGS = ("source", "data", "device", "save_steps", "download", "copy", "gates")
# Which files are shared with the parent's folder is this machine's business; which tensors changed is everybody's.
_OF_WEIGHTS = ("tensors", "tensors_identical", "tensors_written")


def library_versions() -> dict[str, str]:
    """Versions of Python, of this package and of what decides its numbers."""
    versions = {"python": platform.python_version(), "a2d_hf": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """The machine that is at work."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def checkpoint_manifest(run_manifest: dict[str, Any]) -> dict[str, Any]:
    """
    What travels with the checkpoint of a run.

    Args:
        run_manifest (`dict`): the run's `manifest.json`, gates passed.

    Returns:
        `dict`: the content of `a2d_manifest.json`.
    """
    source = run_manifest["source"]
    return {
        "schema_version": SCHEMA_VERSION,
        "a2d_hf_version": __version__,
        "source": {name: source[name] for name in ("name", "model_type", "licence", "sha256", "files")},
        "capabilities": run_manifest["capabilities"],
        "config": {name: value for name, value in run_manifest["config"].items() if name not in _LOCAL_SETTINGS},
        "ingest": run_manifest["ingest"],
        "mask_token": run_manifest["mask_token"],
        "weights": {name: value for name, value in run_manifest["weights"].items() if name in _OF_WEIGHTS},
        "gates": run_manifest["gates"],
        "data": run_manifest["data"],
        "training": run_manifest["training"],
        "results": run_manifest["results"],
        "versions": run_manifest["versions"],
    }
