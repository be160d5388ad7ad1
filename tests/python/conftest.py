"""What the Python tests share: where the build is, and the operators loaded from it."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("GATELOOP_BUILD_DIR", ROOT / "build" / "release"))

# The package in python/ runs on the library of this build.
os.environ["GATELOOP_OPS_LIBRARY"] = str(BUILD / "lib" / "libgateloop_ops.so")


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """The build under test: build/release, or what GATELOOP_BUILD_DIR names."""
    return BUILD


@pytest.fixture(scope="session")
def ops(build_dir: Path) -> torch._ops._OpNamespace:
    """torch.ops.gateloop, from the library that C++ links too."""
    library = build_dir / "lib" / "libgateloop_ops.so"
    if not library.exists():
        pytest.fail(f"{library} is missing: run 'make build' first")
    torch.ops.load_library(str(library))
    return torch.ops.gateloop
