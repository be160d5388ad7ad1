"""The operators' definitions in torch's operators, in place of the kernels of the CPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

_forced = False
# A dispatch key without kernels: its calls reach the definitions, wherever the tensors are.
_WITHOUT_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


def operators() -> list[str]:
    """All with a kernel of the CPU, as the dispatcher lists them."""
    every = (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("gateloop::"))
    on_cpu = torch._C._dispatch_has_kernel_for_dispatch_key
    return sorted(n.removeprefix("gateloop::") for n in every if on_cpu(n, "CPU"))


@contextmanager
def forced() -> Iterator[None]:
    """CPU tensors take the definitions, forward and back, below autograd as on other devices."""
    global _forced
    if _forced:
        yield
        return
    library = torch.library.Library("gateloop", "IMPL")
    try:
        _forced = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name in operators():
                operator = getattr(torch.ops.gateloop, name).default
                definition = partial(operator.redispatch, _WITHOUT_KERNELS)
                library.impl(name, definition, "CPU", allow_override=True)
        yield
    finally:
        _forced = False
        library._destroy()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same bits on the kernels; on the definitions the same numbers, of the size of one.

    There sizes and strides decide where torch vectorises and fuses products with sums. Up to 20
    units in the last place are seen. One is seen where a float32 state is rounded at the end.
    """
    unit = torch.finfo(theirs.dtype).eps
    allowed = unit if theirs.dtype in (torch.bfloat16, torch.float16) else 256 * unit
    allowed = allowed if _forced else 0
    torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed)
