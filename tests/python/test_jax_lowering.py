"""What gateloop_jax's functions become: handlers where the library has them, else plain XLA."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import pytest
from jax import Array
from test_jax_ops import (
    COMPLEX,
    POLAR,
    REAL,
    SIMPLE,
    Case,
    assert_all_close,
    kernel_cases,
    values_and_gradients,
)

from gateloop_jax import (
    _gate_loop,
    _library,
    _linear_recurrence,
    _simple_gate_loop,
)
from gateloop_jax._primitive import keep, primitive


def lowered(f: Callable[..., Any], arguments: list[Array], *platforms: str) -> str:
    return str(jax.jit(f).trace(*arguments).lower(lowering_platforms=platforms).as_text())


def called(program: str) -> set[str]:
    return set(re.findall(r"custom_call @(gateloop_\w+)", program))


@kernel_cases
def test_kernels_where_the_library_has_them_and_plain_xla_elsewhere(case: Case) -> None:

    def f(*arguments: Array) -> Any:
        return values_and_gradients(case.ours, list(arguments))

    kernel = case.function.__name__
    both = {f"gateloop_{kernel}", f"gateloop_{kernel}_backward"}
    for platform in ("cpu", "cuda", "tpu"):
        program = lowered(f, case.arguments(1, 40, 3, wide=False), platform)
        assert called(program) == (both if platform in _library.platforms(kernel) else set())
        assert ("custom_call" in program) == (platform in _library.platforms(kernel))


@pytest.mark.parametrize("kernels", [("cpu",), ("cpu", "cuda")], ids=["cpu", "cuda"])
def test_each_platform_of_a_program_has_its_own(
    monkeypatch: pytest.MonkeyPatch, kernels: tuple[str, ...]
) -> None:
    """With a library that has kernels for CUDA, and with one that has none, whichever is here."""
    monkeypatch.setattr(_library, "platforms", lambda _: kernels)
    p = primitive(
        "a_recurrence",
        _linear_recurrence._definition,
        lambda a, x, initial: [(x.shape, x.dtype), (initial.shape, initial.dtype)],
        kernel="linear_recurrence",
    )

    def f(*arguments: Array) -> Any:
        return p.bind(*arguments, reverse=False)

    # A step of decoding has a handler of its own on CUDA, which needs no scratch.
    for time, on_cuda in (
        (1, "gateloop_linear_recurrence_step"),
        (2, "gateloop_linear_recurrence"),
    ):
        arguments = REAL.arguments(1, time, 3, wide=False)
        cuda = {on_cuda} if "cuda" in kernels else set()
        assert called(lowered(f, arguments, "cpu")) == {"gateloop_linear_recurrence"}
        assert called(lowered(f, arguments, "cuda")) == cuda
        program = lowered(f, arguments, "cpu", "cuda", "tpu")
        assert called(program) == {"gateloop_linear_recurrence"} | cuda
        assert program.count("custom_call @gateloop_") == len(kernels)


KERNELS = [
    _linear_recurrence.recurrence_p,
    _linear_recurrence.adjoint_p,
    _gate_loop.polar.read_p,
    _gate_loop.polar.adjoint_p,
    _simple_gate_loop.simple.read_p,
    _simple_gate_loop.simple.adjoint_p,
]
DEFINITIONS: list[Callable[..., Any]] = [
    _linear_recurrence._definition,
    _linear_recurrence._adjoint,
    _gate_loop._definition,
    _gate_loop.polar.adjoint,
    _simple_gate_loop._definition,
    _simple_gate_loop.simple.adjoint,
]


@pytest.mark.parametrize("reverse", [False, True])
def test_what_runs_elsewhere_equals_the_kernels(x64: None, reverse: bool) -> None:
    linear, polar = COMPLEX.arguments(2, 37, 3), POLAR.arguments(2, 37, 3)
    simple = SIMPLE.arguments(2, 37, 3)
    polar[3] = polar[3].reshape(2, 37, 3, 2)
    arguments = [linear, [*linear, *linear[1:]]]
    for reads, given in ((_gate_loop.polar, polar), (_simple_gate_loop.simple, simple)):
        kept = reads.keeping_p.bind(*given, reverse=reverse)[2]
        arguments += [given, [*given, kept, given[0], given[-1]]]
    for p, definition, args in zip(KERNELS, DEFINITIONS, arguments, strict=True):
        ours, theirs = (
            p.bind(*args, reverse=reverse),
            jax.jit(partial(definition, reverse=reverse))(*args),
        )
        assert_all_close(list(ours), list(theirs), 1e-11)


def test_gradients_from_states_that_were_not_kept_are_huge() -> None:
    """Of a forward pass by the definition and a backward pass by the kernel."""
    polar = POLAR.arguments(2, 37, 3, wide=False)
    polar[3] = polar[3].reshape(2, 37, 3, 2)
    kept = keep(*polar)
    expected = _gate_loop.polar.keeping_p.bind(*polar, reverse=False)[2]
    assert (kept.shape, kept.dtype) == (expected.shape, expected.dtype)
    dq = _gate_loop.polar.adjoint_p.bind(*polar, kept, polar[0], polar[4], reverse=False)[0]
    assert not (abs(dq) < 1e30).all()


def test_no_copies_at_the_boundary() -> None:
    for case in (REAL, POLAR, SIMPLE):
        arguments = case.arguments(2, 64, 8, wide=False)
        program = str(jax.jit(case.ours).lower(*arguments).compile().as_text())
        assert program.count("custom-call(") == 1
        for operation in (" copy(", " transpose(", " fusion("):
            assert operation not in program


def test_needs_no_torch() -> None:
    program = "import sys, gateloop_jax; sys.exit('torch' in sys.modules)"
    path = ":".join(sys.path)
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path = {path!r}.split(':'); {program}"], check=True
    )
