"""The recurrences as functions (arXiv 2311.01927, section 3.2).

All are differentiable in every tensor argument, in forward mode too. They work under autocast,
``torch.compile`` and the transforms of ``torch.func``. Where the sequences are bfloat16 or float16,
the state is float32. Forward mode, and the gradients of ``torch.func``, are those of
the operators' definitions: the memory of a backward pass grows with T log T there.

Two arguments serve sequences of different lengths; a call takes at most one of them:

- ``cu_seqlens``: (N + 1), int32 or int64, on the CPU or on the sequences' device: where N
  sequences, packed along the time of a batch of one, begin and end: 0, then the end of each; the
  last number is T. To CUDA they are copied from the CPU, which waits and cannot be in a graph;
  wrong numbers on CUDA end as wrong indices do, in a failed assertion. Sequences may be
  empty. Each has a state of its own, so that ``initial_state`` and the final state are (N, D).
- ``mask``: (B, T), bool, False at padding, which may be anywhere. A step of padding neither decays
  nor feeds the state. Whatever it holds, the output there is 0 and no gradient flows from it or to
  it. The output of :func:`linear_recurrence` is 0 there too, where the state goes on.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp import _vmap as _vmap  # gives them their batching rules
from gateloop_cpp._directions import both_directions


def linear_recurrence(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The linear recurrence h_t = a_t h_{t-1} + x_t.

    Args:
        a, x: (B, T, D), one dtype of float32, float64, complex64, complex128, bfloat16, float16.
            Read through their strides.
        initial_state: (B, D), h before the first step; float32 for bfloat16 and float16 sequences,
            else the dtype of x. None is zero.
        reverse: run from the last step to the first.
        cu_seqlens, mask: see :mod:`gateloop_cpp.ops`.

    Returns:
        h (B, T, D) in the dtype of x, and the state after the last step (B, D).

    Raises:
        RuntimeError, TypeError, ValueError: naming the argument, what was expected and what came.
    """
    h, final_state = torch.ops.gateloop.linear_recurrence(
        a, x, initial_state, reverse, cu_seqlens, mask
    )
    return h, final_state


def gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    form: Literal["auto", "scan", "attention", "recurrent"] = "auto",
    feature_map: Literal["none", "taylor"] = "none",
) -> tuple[Tensor, Tensor]:
    """The GateLoop operator, S_t = a_t S_{t-1} + k_t^T v_t and y_t = q_t Re(S_t).

    For one channel per head (max heads, the paper's setting), or heads wider than that.

    Args:
        q, k: (B, T, D), or (B, T, H, K) for heads of K channels; float32, float64, bfloat16 or
            float16.
        v: (B, T, D), or (B, T, H, V); the dtype of q.
        a: (B, T, D); or (B, T, H), one transition per head, or (B, T, H, K), one per key;
            complex64 (complex128 with float64 sequences) or real (float32, or float64 with
            float64 sequences). Of heads, products of transitions in 64 steps must be finite
            numbers, as they are where |a| <= 1.
        initial_state: (B, D), or (B, H, K, V), in the dtype of a. None is zero.
        reverse: run from the last step to the first.
        cu_seqlens, mask: see :mod:`gateloop_cpp.ops`.
        form: how to compute it; values and gradients are the same. "scan": linear in T,
            with one state in 64 steps in memory (16 with a transition a key); "auto" takes it.
            "attention": the surrogate attention of section 3.3, T² work, in tiles. "recurrent":
            step by step, with one state in √T steps in memory for a backward pass. In "scan" and
            "attention" an infinity or NaN of heads may make outputs of earlier steps NaN, 0 · ∞
            where they are masked; in "scan" outputs of up to 15 steps before it on the CPU.
        feature_map: "taylor": of heads, with a transition for each, φ(q) and φ(k) in place of q and
            k (arXiv 2312.04927). Their products are 1 + s + s²/2 with s = q · k. States have 1 + K
            + K (K + 1) / 2 keys. Features of all T are in memory under create_graph, in forward
            mode and in torch.func's derivatives alone.

    Returns:
        y (B, T, D) or (B, T, H, V) in the dtype of q; and the state after the last step in the
        dtype of a and the shape of initial_state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        NotImplementedError: derivatives of heads by torch.func under autocast.
    """
    y, final = torch.ops.gateloop.gate_loop(
        q, k, v, a, initial_state, reverse, cu_seqlens, mask, form=form, feature_map=feature_map
    )
    return y, final


def gate_loop_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    state: Tensor,
    feature_map: Literal["none", "taylor"] = "none",
) -> tuple[Tensor, Tensor]:
    """One step of :func:`gate_loop`: its arguments without T, and the next state.

    Args:
        q, k: (B, D), or (B, H, K).
        v: (B, D), or (B, H, V).
        a: (B, D), (B, H) or (B, H, K).
        state: (B, D), or (B, H, K, V), in the dtype of a.
        feature_map: as there, with as many keys of the state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    y, state = torch.ops.gateloop.gate_loop_step(q, k, v, a, state, feature_map=feature_map)
    return y, state


def simple_gate_loop(
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    normalize_input: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The simplified, real gate fused into one pass: h_t = σ(z_t) h_{t-1} + x_t, y_t = q_t h_t.

    Args:
        q, kv, z: (B, T, D), one dtype of float32, float64, bfloat16, float16.
        initial_state: (B, D), float32 (float64 for float64 sequences). None is zero.
        reverse: run from the last step to the first.
        normalize_input: x_t = (1 - σ(z_t)) kv_t instead of kv_t.
        cu_seqlens, mask: see :mod:`gateloop_cpp.ops`.

    Returns:
        y (B, T, D) in the dtype of q, and the state after the last step (B, D).

    Raises:
        RuntimeError, TypeError, ValueError: naming the argument, what was expected and what came.
    """
    y, final = torch.ops.gateloop.simple_gate_loop(
        q, kv, z, initial_state, reverse, normalize_input, cu_seqlens, mask
    )
    return y, final


def polar_gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gate_loop` with max heads from the raw transition: a = σ(|z|) z/|z|, all in one pass.

    Args:
        q, k, v: (B, T, D), one dtype of float32, float64, bfloat16, float16.
        z: (B, T, 2 D) in the same dtype, (real, imaginary) interleaved per channel.
        initial_state: (B, D), complex64 (complex128 for float64 sequences). None is zero.
        reverse: run from the last step to the first.
        cu_seqlens, mask: see :mod:`gateloop_cpp.ops`.

    Returns:
        y (B, T, D) in the dtype of q, and the complex state after the last step (B, D).

    Raises:
        RuntimeError, TypeError, ValueError: naming the argument, what was expected and what came.
    """
    y, final = torch.ops.gateloop.polar_gate_loop(
        q, k, v, z, initial_state, reverse, cu_seqlens, mask
    )
    return y, final


def bidirectional(
    scan: Callable[..., tuple[Tensor, Tensor]],
    forward: Sequence[Tensor],
    backward: Sequence[Tensor] | None = None,
    initial_states: tuple[Tensor | None, Tensor | None] = (None, None),
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The sum of a scan from the first step on and one from the last step on, as encoders read.

    ::

        y, (after_last, after_first) = bidirectional(gate_loop, (q, k, v, a), (q, k, v, a_backward))

    Every step reads all others, and itself once per direction: where no other step has an input,
    the output is twice that of ``scan``.

    Args:
        scan: a function of :mod:`gateloop_cpp.ops` or :mod:`gateloop_cpp.distributed` that takes
            ``initial_state`` and ``reverse``.
        forward: its sequences in order, e.g. (q, k, v, a).
        backward: those that the reverse scan reads, in the order of time too, with outputs of the
            same shape; default: the same.
        initial_states: of the forward scan, before the first step, and of the reverse one, after
            the last. With ``cu_seqlens`` each has a row for every sequence.
        options: ``cu_seqlens``, ``mask`` and all else that ``scan`` takes, the same for both.
            Packed sequences do not read each other; the output at padding is 0.

    Returns:
        The sum of the outputs, and the final states: of the forward scan, after the last step, and
        of the reverse one, after the first.

    Raises:
        ValueError: ``initial_states`` is no tuple or list of two, ``reverse`` or ``initial_state``
            is among the options, or outputs differ in shape.
    """
    return both_directions(scan, forward, backward, initial_states, options)


def release_unused_memory() -> int:
    """Give unused memory of outputs above 32 MiB to the system; returns how many bytes.

    Up to 1 GiB of it is kept for the next outputs of about that size: clearing fresh pages takes as
    long as a recurrence. The system takes it by itself when it runs short (Linux).
    """
    return int(torch.ops.gateloop._release_unused_memory())
