"""How many floating-point operations a second a device can do at best, by its name.

Owns the table. The numbers are the makers' for dense bf16 (fp16 where a device has no bf16), in FLOP/s.
"""

import torch


# The longest name that is part of the device's own counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "MI250X": 383e12,
    "MI300X": 1307e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "T4": 65e12,
    "V100": 125e12,
}


def peak_flops(name: str) -> float | None:
    """
    The peak of a device.

    Args:
        name (`str`): as the driver calls it, for example `NVIDIA H100 80GB HBM3`.

    Returns:
        `float`, *optional*: FLOP/s; `None` for a device that the table does not know.
    """
    words = name.replace("-", " ").split()
    found = [known for known in PEAK_FLOPS if _contains(words, known.split())]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))


def device_peak_flops(device: torch.device) -> float | None:
    """The peak of a device in use; `None` for a CPU and for what the table does not know."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
