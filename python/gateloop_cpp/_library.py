"""Loads the shared library whose operators become ``torch.ops.gateloop.*``."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

NAME = "libgateloop_ops.so"

try:
    VERSION = version("gateloop-cpp")
except PackageNotFoundError:  # imported from the source tree
    VERSION = "0.1.0"


def _find() -> Path:
    """GATELOOP_OPS_LIBRARY names the library of a build; else it lies beside this package."""
    named = os.environ.get("GATELOOP_OPS_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise ImportError(f"gateloop_cpp: GATELOOP_OPS_LIBRARY names {named}, no such file")
        return Path(named)
    # An editable install has the Python files in one folder and the library in another.
    places = [Path(folder) for folder in __import__("gateloop_cpp").__path__]
    for place in places:
        if (place / NAME).is_file():
            return place / NAME
    raise ImportError(
        f"gateloop_cpp: {NAME} is not in {', '.join(map(str, places))}; install the package with "
        "'pip install .', or name the library of a build with GATELOOP_OPS_LIBRARY"
    )


def _load() -> None:
    path = _find()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"gateloop_cpp: {path} does not load with torch {torch.__version__}; it works with the "
            f"torch it was built against: {error}"
        ) from error


_load()
