"""Errors that name the function, the argument, what was expected and what came."""

import torch
from torch import Tensor


def expect(
    condition: bool,
    function: str,
    argument: str,
    expected: str,
    got: object,
    kind: type[Exception] = ValueError,
) -> None:
    if condition:
        return
    came = f"{got.dtype} of shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
    raise kind(f"{function}: {argument} must be {expected}, got {came}")


def expect_positive(function: str, **sizes: int) -> None:
    for argument, size in sizes.items():
        expect(size > 0, function, argument, "positive", size)


def expect_sequence(function: str, x: Tensor, dim: int) -> None:
    """x must be (B, T, dim), floating point."""
    expect(x.ndim == 3 and x.shape[2] == dim, function, "x", f"(B, T, {dim})", x)
    expect(x.is_floating_point(), function, "x", "floating point", x, TypeError)


def expect_wide(function: str, argument: str, state: Tensor) -> None:
    """A state must not be rounded from step to step; FSDP2 rounds what is passed to a module."""
    wide = state.dtype not in (torch.bfloat16, torch.float16)
    expected = "float32 or wider (of FSDP2 by MixedPrecisionPolicy(cast_forward_inputs=False))"
    expect(wide, function, argument, expected, state, TypeError)


def expect_packing(
    function: str,
    x: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    of_block: bool = False,
) -> None:
    """At most one of the two, and what it says fits x (B, T, ...): see gateloop_cpp.ops.

    ``of_block``: cu_seqlens is of the whole whose block x is, and ends at T or later.
    """
    both = cu_seqlens is not None and mask is not None
    expect(not both, function, "mask", "None with cu_seqlens", mask)
    if mask is not None:
        fits = mask.dtype == torch.bool and mask.shape == x.shape[:2]
        expect(fits, function, "mask", f"bool of shape (B, T) = {tuple(x.shape[:2])}", mask)
    if cu_seqlens is None:
        return
    indices = cu_seqlens.dtype in (torch.int64, torch.int32)
    expect(indices, function, "cu_seqlens", "int64 or int32", cu_seqlens, TypeError)
    fits = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 1
    expect(fits, function, "cu_seqlens", "(N + 1) for N sequences", cu_seqlens)
    expect(x.shape[0] == 1, function, "x", "a batch of one with cu_seqlens", x)
    # Neither a compiler nor torch.func.vmap has numbers to show.
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(cu_seqlens):
        return
    cuts = cu_seqlens.tolist()
    time = x.shape[1]
    ends = cuts[-1] >= time if of_block else cuts[-1] == time
    spans = cuts == sorted(cuts) and cuts[0] == 0 and ends
    last = f"T = {time} or more" if of_block else f"T = {time}"
    expect(spans, function, "cu_seqlens", f"0 to {last}, never decreasing", cuts)
