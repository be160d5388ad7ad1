"""What the Python tests share: where the build is, and the operators loaded from it."""

import importlib.util
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import composite
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("GATELOOP_BUILD_DIR", ROOT / "build" / "release"))

# The package in python/ runs on the library of this build.
os.environ["GATELOOP_OPS_LIBRARY"] = str(BUILD / "lib" / "libgateloop_ops.so")
# XLA compiles several hundred small programs: unoptimised machine code halves the time. The flags
# hold on every platform, and XLA has no unoptimised code for GPUs.
if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
# Four devices for shard_map: the state before a third block comes through the second. Read when JAX
# first computes, whichever test that is in.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
# Read when gateloop_jax is imported.
os.environ.setdefault("GATELOOP_JAX_LIBRARY", str(BUILD / "lib" / "libgateloop_jax.so"))
HAS_JAX = importlib.util.find_spec("jax") is not None
# Under nohup, and in the background of a script, these are ignored, by children too.
for _number, _handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
collect_ignore_glob = [] if HAS_JAX else ["test_jax_*.py"]


def thinned(cases: Iterable[Any], step: int) -> list[Any]:
    """Arguments of a test, several as a tuple: `make test` takes every step-th case, and
    `make test-long` the others."""
    tuples = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [
        pytest.param(*case, marks=pytest.mark.long if i % step else ())
        for i, case in enumerate(tuples)
    ]


def assert_no_collective(program: Any) -> None:
    """Of a program that JAX compiled: no device waits for numbers of another."""
    text = str(program.as_text())
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


# Files of few tests that take minutes. They begin first: one that begins last is waited for by all.
SLOW_FILES = ("test_wheel.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)


def pytest_report_header() -> str | None:
    return None if HAS_JAX else "test_jax_*.py left out: there is no jax in this Python"


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """The build under test: build/release, or what GATELOOP_BUILD_DIR names."""
    return BUILD


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX in double precision."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", autouse="GATELOOP_DEFINITIONS" in os.environ)
def on_definitions(ops: Any) -> Iterator[None]:
    """`make test-definitions`: the definitions in place of the kernels in every test."""
    with composite.forced():
        yield


@pytest.fixture(params=["kernels", "definitions"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels of the CPU, then the definitions that other devices take."""
    with composite.forced() if request.param == "definitions" else nullcontext():
        yield


@pytest.fixture(scope="session")
def ops(build_dir: Path) -> torch._ops._OpNamespace:
    """torch.ops.gateloop, from the library that C++ links too."""
    library = build_dir / "lib" / "libgateloop_ops.so"
    if not library.exists():
        pytest.fail(f"{library} is missing: run 'make build' first")
    torch.ops.load_library(str(library))
    return torch.ops.gateloop
