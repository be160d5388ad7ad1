"""The recurrences as functions (arXiv 2311.01927, section 3.2).

All are differentiable in every tensor argument, work under autocast, ``torch.compile`` and
``torch.func.vmap``, and keep the state in float32 where the sequences are bfloat16 or float16.
"""

import torch
from torch import Tensor

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp import _vmap as _vmap  # gives them their batching rules
from gateloop_cpp._checks import expect


def linear_recurrence(
    a: Tensor, x: Tensor, initial_state: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The linear recurrence h_t = a_t h_{t-1} + x_t.

    Args:
        a, x: (B, T, D), one dtype of float32, float64, complex64, complex128, bfloat16, float16.
            Read through their strides.
        initial_state: (B, D), h before the first step; float32 for bfloat16 and float16 sequences,
            else the dtype of x. None is zero.
        reverse: run from the last step to the first.

    Returns:
        h (B, T, D) in the dtype of x, and the state after the last step (B, D).

    Raises:
        RuntimeError, TypeError: naming the argument, what was expected and what came.
    """
    h, final_state = torch.ops.gateloop.linear_recurrence(a, x, initial_state, reverse)
    return h, final_state


def gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The GateLoop operator, S_t = a_t S_{t-1} + k_t^T v_t and y_t = q_t Re(S_t).

    Two forms: one channel per head (max heads, the paper's setting), or heads wider than that.

    Args:
        q, k: (B, T, D), or (B, T, H, K) for heads of K channels; float32, float64, bfloat16 or
            float16.
        v: (B, T, D), or (B, T, H, V); the dtype of q.
        a: (B, T, D), or (B, T, H): the transitions, one per head; complex64 (complex128 with
            float64 sequences) or real (float32, or float64 with float64 sequences).
        initial_state: (B, D), or (B, H, K, V), in the dtype of a. None is zero.
        reverse: run from the last step to the first.

    Returns:
        y (B, T, D) or (B, T, H, V) in the dtype of q, and the state after the last step in the
        dtype of a and the shape of initial_state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_gate_loop(q, k, v, a, initial_state)
    wide = q.ndim == 4
    real = a.real.dtype if a.is_complex() else a.dtype
    kv = k.to(real).unsqueeze(-1) * v.to(real).unsqueeze(-2) if wide else k.to(real) * v.to(real)
    kv = kv.to(a.dtype)
    if wide:
        state_shape = (kv.shape[0], *kv.shape[2:])
        per_channel = a[..., None, None].expand_as(kv).flatten(2)
        initial = None if initial_state is None else initial_state.flatten(1)
        h, final = linear_recurrence(per_channel, kv.flatten(2), initial, reverse)
        h, final = h.view(kv.shape), final.view(state_shape)
    else:
        h, final = linear_recurrence(a, kv, initial_state, reverse)
    h = h.real if h.is_complex() else h
    y = (q.to(real).unsqueeze(-2) @ h).squeeze(-2) if wide else q.to(real) * h
    return y.to(q.dtype), final


def simple_gate_loop(
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    normalize_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """The simplified, real gate fused into one pass: h_t = σ(z_t) h_{t-1} + x_t, y_t = q_t h_t.

    Args:
        q, kv, z: (B, T, D), one dtype of float32, float64, bfloat16, float16.
        initial_state: (B, D), float32 (float64 for float64 sequences). None is zero.
        reverse: run from the last step to the first.
        normalize_input: x_t = (1 - σ(z_t)) kv_t instead of kv_t.

    Returns:
        y (B, T, D) in the dtype of q, and the state after the last step (B, D).

    Raises:
        RuntimeError, TypeError: naming the argument, what was expected and what came.
    """
    y, final = torch.ops.gateloop.simple_gate_loop(
        q, kv, z, initial_state, reverse, normalize_input
    )
    return y, final


def polar_gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`gate_loop` with max heads from the raw transition: a = σ(|z|) z/|z|, all in one pass.

    Args:
        q, k, v: (B, T, D), one dtype of float32, float64, bfloat16, float16.
        z: (B, T, 2 D) in the same dtype, (real, imaginary) interleaved per channel.
        initial_state: (B, D), complex64 (complex128 for float64 sequences). None is zero.
        reverse: run from the last step to the first.

    Returns:
        y (B, T, D) in the dtype of q, and the complex state after the last step (B, D).

    Raises:
        RuntimeError, TypeError: naming the argument, what was expected and what came.
    """
    y, final = torch.ops.gateloop.gate_loop(q, k, v, z, initial_state, reverse)
    return y, final


def _check_gate_loop(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, initial_state: Tensor | None
) -> None:
    name = "gate_loop"
    expect(q.ndim in (3, 4), name, "q", "(B, T, D) or (B, T, H, K)", q)
    expect(q.is_floating_point(), name, "q", "floating point", q, TypeError)
    expect(k.shape == q.shape, name, "k", f"the shape of q, {tuple(q.shape)}", k)
    if q.ndim == 3:
        expect(v.shape == q.shape, name, "v", f"the shape of q, {tuple(q.shape)}", v)
        transitions = tuple(q.shape)
    else:
        transitions = tuple(q.shape[:3])
        fits = v.ndim == 4 and v.shape[:3] == transitions
        expect(fits, name, "v", f"(B, T, H, V) = {(*transitions, 'V')}", v)
    expect(tuple(a.shape) == transitions, name, "a", f"{transitions}, one per head", a)
    for argument, tensor in (("k", k), ("v", v)):
        expect(tensor.dtype == q.dtype, name, argument, f"{q.dtype}, as q", tensor, TypeError)
    double = q.dtype == torch.float64
    kinds = (torch.complex128, torch.float64) if double else (torch.complex64, torch.float32)
    expected = f"{kinds[0]} or {kinds[1]} for {q.dtype} sequences"
    expect(a.dtype in kinds, name, "a", expected, a, TypeError)
    if initial_state is not None:
        state = (q.shape[0], *q.shape[2:], *v.shape[3:])
        expect(initial_state.shape == state, name, "initial_state", str(state), initial_state)
        same = initial_state.dtype == a.dtype
        expect(same, name, "initial_state", f"{a.dtype}, as a", initial_state, TypeError)


def release_unused_memory() -> int:
    """Return to the system what outputs above 32 MiB took and nobody uses; says how many bytes.

    Up to 1 GiB of it is kept for the next outputs of about that size, since clearing fresh pages
    takes as long as a recurrence. The system takes it by itself when it runs short (Linux).
    """
    return int(torch.ops.gateloop._release_unused_memory())
