"""Packages genkit can do without: imported when they are needed, with one clear line when they are not there."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from genkit.errors import GenkitError

# Import name -> the extra of genkit that installs it.
EXTRAS = {
    "matplotlib": "eval",
    "open3d": "3d",
    "scipy": "eval",
    "tensorboard": "train",
    "torch_fidelity": "eval",
    "torchvision": "data",
    "transformers": "encoders",
    "vector_quantize_pytorch": "bench",
}
# Import name -> Debian packages of the system libraries its wheel expects and does not bring.
LIBRARIES = {"open3d": ("libusb-1.0-0", "libgl1", "libegl1", "libx11-6", "libgomp1")}


def is_installed(name: str) -> bool:
    """Whether the package is there; imports nothing, so a missing system library is not noticed."""
    return importlib.util.find_spec(name) is not None


def require(name: str) -> ModuleType:
    """Import an optional package.

    Raises: GenkitError naming the extra for a missing package, and the Debian packages for a missing system library.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == package:
            raise GenkitError(f"{package} is not installed; pip install 'genkit-torch[{EXTRAS[package]}]'") from None
        raise GenkitError(f"{name} is installed, but a module it needs is not: {error}") from None
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        if name in LIBRARIES:
            packages = " ".join(LIBRARIES[name])
            raise GenkitError(
                f"{name} lacks a system library ({reason}); as root: apt-get install {packages}"
            ) from None
        raise GenkitError(f"{name} cannot be imported: {reason}") from None
