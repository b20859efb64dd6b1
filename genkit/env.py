"""What this machine offers: read it first when something is slow or missing, paste it into a bug report."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import genkit
from genkit import console, optional

_PACKAGES = ("torch", "diffusers", "accelerate", "einops", "numpy", "pillow", "safetensors", "pydantic", "pyyaml")
_VARIABLES = (
    "GENKIT_CACHE",
    "GENKIT_CPU_SET",
    "GENKIT_DATA",
    "GENKIT_KERNEL",
    "GENKIT_WEIGHTS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)
_HERE = Path(__file__).parent


def collect() -> dict[str, Any]:
    """Versions, device, threads, memory, optional packages, weights, kernels and cache folders, as plain data."""
    import torch

    from genkit import native, weights

    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {
        "genkit": genkit.__version__,
        "folder": str(_HERE),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "optional": {name: _version(name) if optional.is_installed(name) else None for name in optional.EXTRAS},
        "devices": devices or ["cpu"],
        "bf16": torch.cuda.is_bf16_supported() if cuda else False,
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "weights": [
            str(path)
            for folder in (_HERE / "metrics" / "weights", weights.weights_folder())
            for path in _weights(folder)
        ],
        "kernels": _kernels(),
        "cpu_set": native.instruction_set(),
        "cache": str(weights.weights_folder().parent),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def render(found: dict[str, Any]) -> str:
    """The same as people read it."""
    rows: list[tuple[str, str]] = [
        ("genkit", f"{found['genkit']} in {found['folder']}"),
        ("python", f"{found['python']} ({found['executable']})"),
        ("system", found["system"]),
        ("device", ", ".join(found["devices"]) + (" with bf16" if found["bf16"] else "")),
        ("cpu", f"{found['cpu']}, {found['cpus']} usable, {found['threads']} torch threads"),
        ("memory", f"{found['memory_gib']} GiB" if found["memory_gib"] else "unknown"),
        ("packages", ", ".join(f"{name} {version}" for name, version in found["packages"].items())),
    ]
    rows += [
        (f"extra {optional.EXTRAS[name]}", f"{name} {version}" if version else f"{name} is not installed")
        for name, version in found["optional"].items()
    ]
    rows += [("weights", path) for path in found["weights"]] or [("weights", "none")]
    rows += [("kernels", f"CPU libraries for {found['cpu_set']}")]
    rows += [
        (f"kernel {name}", "; ".join(path if state == "ready" else f"{path}: {state}" for path, state in table.items()))
        for name, table in found["kernels"].items()
    ]
    rows += [("cache", found["cache"])]
    rows += [("variable", f"{name}={value}") for name, value in found["variables"].items()]
    return console.table(rows)


def _version(name: str) -> str | None:
    """The installed version of an import name, else of a distribution name; None when it is not there."""
    for distribution in (name, name.replace("_", "-"), f"{name}-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version" if name in optional.EXTRAS else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not POSIX
        return None


def _weights(folder: Path) -> list[Path]:
    """Files of weights of feature nets."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".pt", ".pth"))


def _kernels() -> dict[str, dict[str, str]]:
    """Operation -> path -> "ready", or why it cannot run here."""
    from genkit import dispatch

    return {name: dispatch.Operation(name).table() for name in dispatch.operations()}
