"""Each operator, private ones too, checks each tensor that it reads and names it in its error."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gateloop_cpp import ops as _ops  # loads the operators

__all__ = ["_ops"]


def names() -> list[str]:
    """All operators of a recurrence, as the dispatcher lists them."""
    every = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("gateloop::")]
    return sorted(n for n in every if "recurrence" in n or "gate_loop" in n)


B, T, D, BLOCKS = 2, 40, 3, 3
H, V = 5, 4  # of wide heads


def sequence(width: int = D) -> Tensor:
    return torch.randn(B, T, width)


def state() -> Tensor:
    return torch.randn(B, D)


def saved(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, BLOCKS, D, dtype=dtype)


def complex_state() -> Tensor:
    return torch.randn(B, D, dtype=C64)


C64 = torch.complex64
pytestmark = pytest.mark.usefixtures("implementation", "one_process")
GROUP = "0"  # torch's name of the first


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """The group of those operators that take one."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None and dist.group.WORLD.group_name == GROUP
    yield
    dist.destroy_process_group()


def arguments(name: str) -> dict[str, Any]:
    """What the operator takes, by name; the sequence that the others are checked against first."""
    options: dict[str, Any] = {"reverse": False}
    if "time_sharded" in name:
        options["group"] = GROUP
    if "simple" in name:
        options["normalize_input"] = False
        forward = {"q": sequence(), "kv": sequence(), "z": sequence()}
        kept, states = saved(), state
    elif "polar" in name:
        forward = {"q": sequence(), "k": sequence(), "v": sequence(), "z": sequence(2 * D)}
        kept, states = saved(C64), complex_state
    elif "step" in name:
        forward = {n: torch.randn(B, D) for n in "qkva"}
        return forward | {"state": state()}
    elif "chunked" in name or "attention" in name:
        kept = torch.randn(B, 1, H, 1, D, V)

        def states() -> Tensor:
            return torch.randn(B, H, D, V)

        forward = {n: torch.randn(B, T, H, D) for n in "qk"}
        forward |= {"v": torch.randn(B, T, H, V), "a": sequence(H)}
        if "backward" in name:
            gradients = {"dy": torch.randn(B, T, H, V), "dfinal_state": states()}
            return forward | gradients | {"saved_states": kept} | options
    elif "gate_loop" in name:
        forward = {"q": sequence(), "k": sequence(), "v": sequence(), "a": sequence()}
        kept, states = saved(), state
    elif "backward" in name:
        forward = {"h": sequence(), "a": sequence(), "dh": sequence(), "initial_state": state()}
        return forward | {"dfinal_state": state()} | options
    else:
        forward = {"x": sequence(), "a": sequence()}
        kept, states = saved(), state
    if "backward" in name:
        gradients = {"dy": sequence(), "dfinal_state": states()}
        return forward | gradients | {"saved_states": kept} | options
    return forward | {"initial_state": states()} | options


def sparse(t: Tensor) -> Tensor:
    return t.to_sparse()


def mkldnn(t: Tensor) -> Tensor:
    dense = t.real.contiguous()
    return (dense.flatten(4) if dense.dim() > 5 else dense).to_mkldnn()


def quantized(t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t.real.contiguous(), 0.1, 0, torch.qint8)


def without_memory(t: Tensor) -> Tensor:
    freed = t.clone()
    freed.untyped_storage().resize_(0)
    return freed


def shortened(t: Tensor) -> Tensor:
    return t[:, :-1]


SPOILERS: list[Callable[[Tensor], Tensor]] = [
    shortened,
    lambda t: t[..., :-1],
    lambda t: t[:1],
    lambda t: t[0],
    lambda t: t.to(torch.complex128 if t.is_complex() else torch.float64),
    lambda t: t.to(torch.int64) if not t.is_complex() else t.real,
    lambda t: t.to("meta"),
]
LAYOUTS = [sparse, mkldnn, quantized]


def operator(name: str) -> Any:
    return getattr(torch.ops.gateloop, name.removeprefix("gateloop::")).default


def tensors(name: str) -> list[str]:
    return [argument for argument, value in arguments(name).items() if isinstance(value, Tensor)]


EACH = [(name, argument) for name in names() for argument in tensors(name)]


@pytest.mark.parametrize("name", names())
def test_valid_arguments_are_taken(name: str) -> None:
    operator(name)(**arguments(name))


def refusal(name: str, given: dict[str, Any]) -> str:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        operator(name)(**given)
    return str(raised.value).splitlines()[0]


@pytest.mark.parametrize("spoiler", range(len(SPOILERS)))
@pytest.mark.parametrize(("name", "argument"), EACH)
def test_another_shape_type_or_device_is_refused(name: str, argument: str, spoiler: int) -> None:
    given = arguments(name)
    others = [given[other] for other in tensors(name) if other != argument]
    given[argument] = SPOILERS[spoiler](given[argument])
    # Where the first is another, the rest does not go with it.
    first = bool(others) and argument == tensors(name)[0]
    # The width of v is its own.
    first = first or (argument == "v" and ("chunked" in name or "attention" in name))
    pattern = r"\w+" if first else argument
    # The public operator is the one that users call: its forward with saved states has its name.
    said = name.removesuffix("_forward").replace("::_", "::_?")
    assert_matches(refusal(name, given), rf"{said}: {pattern} must ")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "argument"), EACH)
def test_tensors_without_plain_memory_are_refused(
    name: str, argument: str, layout: Callable[[Tensor], Tensor]
) -> None:
    given = arguments(name)
    given[argument] = layout(given[argument])
    said = name.removesuffix("_forward").replace("::_", "::_?")
    assert_matches(refusal(name, given), rf"{said}\w*: {argument} must ")


# These are made of other operators, and torch's own read what is not there.
MADE_OF_OTHERS = (
    "gateloop::gate_loop",
    "gateloop::gate_loop_step",
    "gateloop::time_sharded_gate_loop",
)


@pytest.mark.parametrize(("name", "argument"), [e for e in EACH if e[0] not in MADE_OF_OTHERS])
def test_a_freed_storage_is_refused(name: str, argument: str) -> None:
    given = arguments(name)
    given[argument] = without_memory(given[argument])
    said = name.removesuffix("_forward").replace("::_", "::_?")
    assert_matches(refusal(name, given), rf"{said}: {argument} must lie in \d+ bytes")


def strided(t: Tensor) -> Tensor:
    """The same numbers, every second of its memory."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def overlapping(t: Tensor) -> Tensor:
    """The first row in every place, without memory for the others."""
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [strided, overlapping, lambda t: t.mT.contiguous().mT])
@pytest.mark.parametrize(("name", "argument"), EACH)
def test_any_strides_are_read(name: str, argument: str, layout: Callable[[Tensor], Tensor]) -> None:
    given = arguments(name)
    given[argument] = layout(given[argument])
    plain = given | {argument: given[argument].clone(memory_format=torch.contiguous_format)}
    for ours, expected in zip(operator(name)(**given), operator(name)(**plain), strict=True):
        torch.testing.assert_close(ours, expected)


def row(width: int = D) -> Tensor:
    return torch.randn(width)


# What modules compute beside recurrences, and the tensors that it reads.
OF_ROWS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "rms_norm": lambda: {"x": sequence(), "gamma": row()},
    "_rms_norm_backward": lambda: {"dy": sequence(), "x": sequence(), "gamma": row()},
    "linear": lambda: {
        "x": torch.randn(B, 128, 64),  # of 2^20 multiply-adds, which oneDNN may compute
        "weight": torch.randn(64, 64),
        "bias": row(64),
    },
    "gelu": lambda: {"x": sequence()},
    "swish_gate": lambda: {"g": sequence(), "x": sequence()},
    "add_then_rms_norm": lambda: {"x": sequence(), "y": sequence(), "gamma": row()},
    "add_then_layer_norm": lambda: {
        "x": sequence(),
        "y": sequence(),
        "weight": row(),
        "bias": row(),
    },
}


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, f in OF_ROWS.items() for a in f()])
def test_a_freed_storage_of_rows_is_refused(name: str, argument: str) -> None:
    given = OF_ROWS[name]()
    given[argument] = without_memory(given[argument])
    with pytest.raises(RuntimeError, match=rf"gateloop::{name}: {argument} must lie in \d+ bytes"):
        operator(name)(**given)


def assert_matches(message: str, pattern: str) -> None:
    assert re.search(pattern, message), f"{message!r} has no {pattern!r}"


@pytest.mark.parametrize("name", names())
def test_meta_tensors_are_checked_too(name: str) -> None:
    for argument in tensors(name)[1:]:
        given = {
            k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments(name).items()
        }
        given[argument] = shortened(given[argument])
        assert_matches(refusal(name, given), f": {argument} must ")


@pytest.mark.parametrize("key", ["CUDA", "XLA", "SparseCPU", "QuantizedCPU", "MkldnnCPU"])
@pytest.mark.parametrize("name", [*names(), *(f"gateloop::{name}" for name in OF_ROWS)])
def test_every_operator_has_an_answer_on_every_backend(name: str, key: str) -> None:
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)


# A hook may return anything in place of a saved tensor.
def test_saved_tensor_hooks_cannot_crash_the_backward_pass() -> None:
    leaves = [sequence().requires_grad_() for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, shortened):
        y, _ = torch.ops.gateloop.simple_gate_loop(*leaves)
    with pytest.raises(RuntimeError, match=r"_simple_gate_loop_backward: dy must be"):
        y.sum().backward()


EMPTIED: list[Callable[[Tensor], Tensor]] = [
    shortened,
    lambda t: t[:0],
    without_memory,
    lambda t: torch.cat([t, t]),
]


@pytest.mark.parametrize("spoiler", range(len(EMPTIED)))
@pytest.mark.parametrize(
    "name", ["linear", "add_then_rms_norm", "add_then_layer_norm", "gelu", "swish_gate"]
)
def test_saved_rows_of_another_shape_cannot_crash(name: str, spoiler: int) -> None:
    leaves = {k: v.requires_grad_() for k, v in OF_ROWS[name]().items()}

    def spoil(t: Tensor) -> Tensor:
        return EMPTIED[spoiler](t) if t.dim() == 3 or spoiler > 0 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, spoil):
        y = operator(name)(**leaves)
    first: Tensor = y if isinstance(y, Tensor) else y[-1]
    assert first.grad_fn
    if name == "linear" and "LinearFunction" not in first.grad_fn.name():
        pytest.skip("this processor has torch's own linear, which reads what hooks give")
    said = "must lie in" if EMPTIED[spoiler] is without_memory else None
    with pytest.raises(RuntimeError, match=said):
        first.sum().backward()


@pytest.mark.parametrize("name", ["polar_gate_loop", "simple_gate_loop"])
def test_saved_states_of_another_layout_give_the_same_gradients(name: str) -> None:
    forward = arguments(f"gateloop::{name}")
    leaves = [t.requires_grad_() for t in forward.values() if isinstance(t, Tensor)]
    expected = torch.autograd.grad(operator(f"gateloop::{name}")(*leaves)[0].sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
        y = operator(f"gateloop::{name}")(*leaves)[0]
    for ours, whole in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, whole)
