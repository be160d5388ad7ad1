"""What our primitives share: kernels where there are, the definition elsewhere, vmap, sharding.

Leading axes are independent, so that vmap adds one. A Form says how arguments may be sharded and
how the kernel is called. Of SEQUENCES arguments and results are sequences (..., T, D), pairs
(..., T, D, 2), states (..., D) and saved states (..., N, D), the first argument a sequence.
Channels are independent too: arrays sharded along them or leading axes are computed where they lie.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir

from gateloop_jax import _library, _sharding

Function = TypeVar("Function", bound=Callable[..., Any])
Definition = Callable[..., Sequence[Array]]
# Avals of the arguments -> (shape, dtype) of each result.
Outputs = Callable[..., Sequence[tuple[tuple[int, ...], Any]]]


def one_program(function: Function) -> Function:
    """A public function as one program outside of jax.jit too. In a program alone JAX puts arrays
    without a mesh, such as states of zeros, on the explicit mesh of others."""
    options = ("reverse", "normalize_input", "form", "feature_map", "num_segments", "axis_name")
    names = [name for name in options if name in inspect.signature(function).parameters]
    return cast(Function, jax.jit(function, static_argnames=names))


@dataclass(frozen=True)
class Form:
    """What differs between primitives of other arguments.

    options:   the primitive's parameters by name.
    align:     (name, arguments) -> the arguments sharded alike.
    shardings: (name, avals, numbers of axes) -> the sharding of each result.
    call:      (kernel, platform, context, avals, operands, options) -> what the kernel's handler
               returns, or None where the definition must serve.
    """

    options: tuple[str, ...]
    align: Callable[[str, Sequence[Array]], Sequence[Array]]
    shardings: Callable[[str, Sequence[Any], Sequence[int]], Sequence[Any]]
    call: Callable[..., Any]


_forms: dict[Primitive, Form] = {}


def _sequence_shardings(name: str, avals: Sequence[Any], axes: Sequence[int]) -> list[Any]:
    shared = _sharding.axes_of(name, avals)
    return [_sharding.sharding_of(shared, avals, ndim) for ndim in axes]


def is_partitioned(ctx: Any) -> bool:
    """Several devices, and an axis of theirs that no shard_map has made manual."""
    axes = ctx.module_context.axis_context
    manual: frozenset[Any] = getattr(axes, "manual_axes", frozenset())
    mesh = getattr(axes, "mesh", None)
    if mesh is not None:
        return bool(mesh.size > 1 and set(manual) != set(mesh.axis_names))
    return bool(getattr(axes, "num_devices", 1) > 1)


def _call_sequences(
    kernel: str, platform: str, ctx: Any, inputs: Any, operands: Any, options: dict[str, Any]
) -> Any:
    """The results of the handler. XLA partitions custom calls along leading axes. A program that it
    partitions therefore names the axes with time last. Its layout leaves memory as it is. XLA's CPU
    compiler then copies the results, so other programs name the axes as they are."""
    target = _library.target(kernel, platform, inputs[0].shape[-2])
    lead = inputs[0].ndim - 2
    turned = is_partitioned(ctx)

    def turn(ndim: int) -> list[int]:
        order = list(range(ndim))
        if turned and ndim > lead + 1:
            order[lead : lead + 2] = [lead + 1, lead]
        return order

    def named(avals: Any) -> list[Any]:
        return [ShapedArray(tuple(a.shape[i] for i in turn(a.ndim)), a.dtype) for a in avals]

    def moved(values: Any, avals: Any) -> list[Any]:
        if not turned:
            return list(values)
        return [stablehlo.transpose(x, turn(a.ndim)) for x, a in zip(values, avals, strict=True)]

    avals_in, avals_out = named(inputs), named(ctx.avals_out)
    shapes = [a.shape for a in avals_in], [a.shape for a in avals_out]
    rule = jax.ffi.ffi_lowering(
        target,
        operand_layouts=[turn(a.ndim)[::-1] for a in avals_in],
        result_layouts=[turn(a.ndim)[::-1] for a in avals_out],
        extra_attributes=_sharding.attributes(lead, *shapes) if turned else None,
    )
    ctx_of_call = ctx.replace(avals_in=avals_in, avals_out=avals_out)
    values = rule(ctx_of_call, *moved(operands, inputs), **options, time_last=turned)
    return moved(values, avals_out)


SEQUENCES = Form(("reverse",), _sharding.align, _sequence_shardings, _call_sequences)


def primitive(
    name: str,
    definition: Definition,
    outputs: Outputs,
    kernel: str | None = None,
    unread: tuple[int, ...] = (),
    form: Form = SEQUENCES,
) -> Primitive:
    """A primitive of SEQUENCES, or of another form.

    `kernel` names the handler that computes it, without the arguments at `unread`, where the
    library has one. Where there is no kernel, and on other platforms, `definition` computes it.
    Derivatives are those of the definition until the caller gives better ones.
    """
    p = Primitive(name)
    p.multiple_results = True
    _forms[p] = form

    @functools.partial(jax.jit, static_argnames=form.options)
    def run(*args: Array, **options: Any) -> Any:
        return p.bind(*args, **options)

    def abstract(*avals: Any, **options: Any) -> list[Any]:
        results = outputs(*avals)
        shardings = form.shardings(name, avals, [len(shape) for shape, _ in results])
        return [
            avals[0].update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)
            for (shape, dtype), sharding in zip(results, shardings, strict=True)
        ]

    def batch(args: Sequence[Array], dims: Sequence[int | None], **options: Any) -> Any:
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)

        def lead(x: Array, d: int | None) -> Array:
            return jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)

        results = bind(p, *map(lead, args, dims), **options)
        return results, [0] * len(results)

    def jvp(primals: Any, tangents: Any, **options: Any) -> Any:
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        f = functools.partial(definition, **options)
        return jax.jvp(f, tuple(primals), tangents)

    p.def_impl(run)
    p.def_abstract_eval(abstract)
    batching.primitive_batchers[p] = batch
    ad.primitive_jvps[p] = jvp
    lower_definition = mlir.lower_fun(definition, multiple_results=True)
    mlir.register_lowering(p, lower_definition)
    if kernel is None:
        return p

    def lower(ctx: Any, *operands: Any, platform: str, **options: Any) -> Any:
        read = [i for i in range(len(operands)) if i not in unread]
        inputs, values = [ctx.avals_in[i] for i in read], [operands[i] for i in read]
        results = form.call(kernel, platform, ctx, inputs, values, options)
        return lower_definition(ctx, *operands, **options) if results is None else results

    for platform in _library.platforms(kernel):
        rule = functools.partial(lower, platform=platform)
        mlir.register_lowering(p, rule, platform=platform)
    return p


def bind(p: Primitive, *args: Array, **options: Any) -> list[Array]:
    """p.bind for arguments that differ: some vary over a shard_map's axes, or are sharded along
    explicit axes, and some do not (yet)."""
    args = tuple(_forms[p].align(p.name, args))
    axes = [jax.typeof(x).manual_axis_type.varying for x in args]
    everywhere = frozenset[Any]().union(*axes)

    def vary(x: Array, own: frozenset[Any]) -> Array:
        missing = tuple(everywhere - own)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    results: list[Array] = p.bind(*map(vary, args, axes), **options)
    return results


def set_transpose(
    p: Primitive, first_linear: int, transpose: Callable[..., Sequence[Array]]
) -> None:
    """`transpose(*args, *cotangents, **options)` of a primitive linear in its arguments from
    `first_linear` on; it is given the arguments before."""

    def rule(cotangents: Any, *args: Any, **options: Any) -> list[Any]:
        cotangents = map(ad.instantiate_zeros, cotangents)
        results = transpose(*args[:first_linear], *cotangents, **options)
        wanted = map(ad.is_undefined_primal, args[first_linear:])
        given: list[Any] = [None] * first_linear
        return given + [ct if w else None for w, ct in zip(wanted, results, strict=True)]

    ad.primitive_transposes[p] = rule


def flip(x: Array, reverse: bool) -> Array:
    """A sequence along time."""
    return jnp.flip(x, -2) if reverse else x


def parts(x: Array, axis: int = -1, *, conj: bool = False) -> Array:
    """Real and imaginary parts side by side along `axis`, a real x as it is: the product of one
    with a conjugated other is the real part of theirs, in one product of real matrices."""
    if not jnp.iscomplexobj(x):
        return x
    return jnp.concatenate([x.real, -x.imag if conj else x.imag], axis)


def product(equation: str, *factors: Array) -> Array:
    """In full float32: accelerators would round factors to fewer bits."""
    return jnp.einsum(equation, *factors, precision=jax.lax.Precision.HIGHEST)


def unkept(dtype: Any) -> float:
    """What stands for a state that was not kept: a gradient computed from it is too large to pass
    for right, and jax_debug_nans lets it through."""
    return float(np.finfo(dtype).max)


def accumulation(dtype: Any) -> Any:
    """The dtype of states: bfloat16 and float16 are storage only."""
    return jnp.promote_types(dtype, jnp.float32)


def to_complex(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.complex64)


@dataclass(frozen=True)
class Reads:
    """A read of states, the one that a derivative's forward pass keeps states of, and the adjoint,
    as primitive and as definition."""

    read_p: Primitive
    keeping_p: Primitive
    adjoint_p: Primitive
    adjoint: Definition


# recurrence.h: of max heads a state is kept at the start of every block of so many steps.
SAVED_STATE_BLOCK = 16


def kept_shape(*args: Array) -> tuple[tuple[int, ...], Any]:
    """Of a read of sequences (..., T, D): shape and dtype of its kept states."""
    *lead, time, channels = args[0].shape
    return (*lead, -(-time // SAVED_STATE_BLOCK), channels), args[-1].dtype


def keep(*args: Array) -> Array:
    shape, dtype = kept_shape(*args)
    # Made of the initial state, so that it is sharded as that is.
    return jnp.broadcast_to(args[-1][..., None, :] * 0 + unkept(dtype), shape)


def read_primitives(
    name: str,
    kernel: str,
    definition: Definition,
    kept_shape: Callable[..., tuple[tuple[int, ...], Any]],
    keep: Callable[..., Array],
    form: Form = SEQUENCES,
    count: int = 5,
) -> Reads:
    """Of `count` arguments, sequences and a state, to y and the final state; with derivatives.

    The arguments are q, k, v, what makes transitions, and the state; without v where they are four.
    y is as the third argument.

    The forward pass of a derivative keeps states for the adjoint's kernel, `kernel`_backward: of
    the same arguments, kept_shape() is their shape and dtype, and keep() what stands for them where
    `definition` computes: of max heads the functions above. No definition reads them.
    """

    def results(*args: Array) -> Any:
        return [(x.shape, x.dtype) for x in (args[2], args[count - 1])]

    def keeping(*args: Array, **options: Any) -> Sequence[Array]:
        return *definition(*args, **options), keep(*args)

    def tangent(*args: Array, **options: Any) -> Any:
        given, moves = args[:count], args[count + 1 :]
        return jax.jvp(functools.partial(definition, **options), given, moves)[1]

    def adjoint(*args: Array, **options: Any) -> list[Array]:
        """In the convention of the kernel: of complex arrays, the conjugates of JAX's."""
        given, dy, dfinal = args[:count], *args[count + 1 :]
        back = jax.vjp(functools.partial(definition, **options), *given)[1]
        return [jnp.conj(d) for d in back((dy, jnp.conj(dfinal)))]

    read_p = primitive(name, definition, results, kernel, form=form)
    keeping_p = primitive(
        f"{name}_keeping_states",
        keeping,
        lambda *args: [*results(*args), kept_shape(*args)],
        kernel,
        form=form,
    )
    tangent_p = primitive(f"{name}_tangent", tangent, results, form=form)
    adjoint_p = primitive(
        f"{name}_adjoint",
        adjoint,
        lambda *args: [(x.shape, x.dtype) for x in args[:count]],
        f"{kernel}_backward",
        # Kept states begin with the initial one; derivatives alone need it by name.
        unread=(count - 1,),
        form=form,
    )

    def keeping_jvp(primals: Any, tangents: Any, **options: Any) -> tuple[list[Array], list[Array]]:
        y, final, kept = bind(keeping_p, *primals, **options)
        moves = bind(tangent_p, *primals, kept, *map(ad.instantiate_zeros, tangents), **options)
        # Kept states repeat what the other arguments say, and no derivative goes through them.
        return [y, final, kept], [*moves, jnp.zeros_like(kept)]

    def jvp(primals: Any, tangents: Any, **options: Any) -> tuple[list[Array], list[Array]]:
        values, moves = keeping_jvp(primals, tangents, **options)
        return values[:2], moves[:2]

    def tangent_transpose(*args: Array, **options: Any) -> list[Array]:
        *given, dy, dfinal = args
        return [jnp.conj(d) for d in bind(adjoint_p, *given, dy, jnp.conj(dfinal), **options)]

    def adjoint_transpose(*args: Array, **options: Any) -> list[Array]:
        given, cotangents = args[: count + 1], list(args[count + 1 :])
        f = functools.partial(adjoint, *given, **options)
        return list(jax.linear_transpose(f, given[2], given[count - 1])(cotangents))

    def read_transpose(cotangents: Any, *args: Any, **options: Any) -> list[Any]:
        """Of the arguments in which a caller of jax.linear_transpose takes it for linear."""
        linear = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]

        def of_linear(*given: Array) -> Any:
            every = list(args)
            for i, x in zip(linear, given, strict=True):
                every[i] = x
            return definition(*every, **options)

        back = jax.linear_transpose(of_linear, *(args[i].aval for i in linear))
        found = back(tuple(map(ad.instantiate_zeros, cotangents)))
        results: list[Any] = [None] * count
        for i, x in zip(linear, found, strict=True):
            results[i] = x
        return results

    ad.primitive_transposes[read_p] = read_transpose
    ad.primitive_jvps[read_p] = jvp
    ad.primitive_jvps[keeping_p] = keeping_jvp
    set_transpose(tangent_p, count + 1, tangent_transpose)
    set_transpose(adjoint_p, count + 1, adjoint_transpose)
    return Reads(read_p, keeping_p, adjoint_p, adjoint)
