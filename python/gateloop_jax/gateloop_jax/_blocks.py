"""What the layers of a model are made of. Shapes: B batch, T time, D channels."""

import abc
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax, random

from gateloop_jax._packing import Packing
from gateloop_jax._primitive import accumulation
from gateloop_jax._weights import Weight, own, within

# ---- Norms: what each does before a block, and after the block's residual sum --------------------


class RMSNorm(eqx.Module):
    """x √D γ / |x|. `eps` is added to |x|²; with none, |x| is at least 1e-12."""

    gamma: Array  # (D)
    eps: float | None = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        # Squares of float16 overflow from 256 on, and 1e-24 is zero there.
        wide = x.astype(accumulation(x.dtype))
        squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        squares = jnp.maximum(squares, 1e-24) if self.eps is None else squares + self.eps
        y = wide * lax.rsqrt(squares) * (self.gamma * math.sqrt(x.shape[-1]))
        return y.astype(jnp.result_type(x, self.gamma))

    def before(self, x: Array) -> Array:
        return self(x)

    def after(self, x: Array) -> Array:
        return x

    def weights(self) -> Iterator[Weight]:
        yield from own(self, "gamma", "gamma")


class LayerNorm(eqx.Module):
    """torch.nn.LayerNorm."""

    weight: Array  # (D)
    bias: Array  # (D)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(accumulation(x.dtype))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * lax.rsqrt(variance + 1e-5) * self.weight + self.bias
        return y.astype(jnp.result_type(x, self.weight))

    def before(self, x: Array) -> Array:
        return x

    def after(self, x: Array) -> Array:
        return self(x)

    def weights(self) -> Iterator[Weight]:
        yield from own(self, "weight", "weight")
        yield from own(self, "bias", "bias")


class NoNorm(eqx.Module):
    def __call__(self, x: Array) -> Array:
        return x

    before = after = __call__

    def weights(self) -> Iterator[Weight]:
        yield from ()


Norm = RMSNorm | LayerNorm | NoNorm


def layer_norm(dim: int) -> LayerNorm:
    return LayerNorm(jnp.ones(dim), jnp.zeros(dim))


# ---- What one model has everywhere ---------------------------------------------------------------


class Linear(eqx.Module):
    weight: Array  # (in, out)
    bias: Array  # (out)

    def __call__(self, x: Array) -> Array:
        return x @ self.weight + self.bias

    def weights(self) -> Iterator[Weight]:
        yield from own(self, "weight", "weight")
        yield from own(self, "bias", "bias")


class Recipe(NamedTuple):
    """What all blocks of a model have in common, initial weights included."""

    dim: int
    like_jax: bool = False
    post_norm: bool = False
    ablate_complex: bool = False
    ablate_state_transition: bool = False

    def norm(self) -> Norm:
        """Of a block."""
        return layer_norm(self.dim) if self.post_norm else self.rms_norm()

    def rms_norm(self) -> RMSNorm:
        return RMSNorm(jnp.ones(self.dim), 1e-5 if self.like_jax else None)

    def matrix(self, key: Array, fan_in: int, fan_out: int) -> Array:
        shape = (fan_in, fan_out)
        return random.normal(key, shape) if self.like_jax else uniform(key, shape, fan_in)

    def linear(self, key: Array, fan_in: int, fan_out: int) -> Linear:
        weight_key, bias_key = random.split(key)
        shape = (fan_out,)
        bias = random.normal(bias_key, shape) if self.like_jax else uniform(bias_key, shape, fan_in)
        return Linear(self.matrix(weight_key, fan_in, fan_out), bias)


def uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """torch.nn.Linear's."""
    return random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(fan_in)


# ---- Blocks --------------------------------------------------------------------------------------


class Block(eqx.Module):
    """A map f of sequences and its residual connection: x + f(norm(x)), or norm(x + f(x))."""

    norm: eqx.AbstractVar[Norm]

    def __call__(self, x: Array) -> Array:
        """(B, T, D) -> (B, T, D), without the residual connection."""
        return self.advance(x, None)[0]

    def advance(self, x: Array, state: Any, packing: Packing | None = None) -> tuple[Array, Any]:
        """The same from a state on -> the output, and the state after it."""
        return self.mix(self.norm.before(x), state, packing)

    def residual(self, x: Array, state: Any, packing: Packing | None = None) -> tuple[Array, Any]:
        """The same with the residual connection."""
        y, state = self.advance(x, state, packing)
        return self.norm.after(x + y), state

    @abc.abstractmethod
    def mix(self, x: Array, state: Any, packing: Packing | None = None) -> tuple[Array, Any]:
        """f. A state of None: x begins the sequence, and no state is returned."""

    @abc.abstractmethod
    def weights(self) -> Iterator[Weight]:
        """Named as in a layer of the PyTorch model: 0 the mixer, 1 the feed-forward, 2 the simple
        gate loop."""


class Mixer(Block):
    """A block that mixes in time."""

    @abc.abstractmethod
    def make_state(self, batch: int, dtype: Any, length: int | None) -> Any:
        """Of no steps; every array begins with the batch. `length`: of the longest sequence, for
        mixers that keep all of it."""


class Mixers(eqx.Module):
    """Any number of mixers, one after the other."""

    parts: tuple[Mixer, ...]

    def residual(self, x: Array, state: Any, packing: Packing | None = None) -> tuple[Array, Any]:
        before = (None,) * len(self.parts) if state is None else state
        if len(before) != len(self.parts):
            raise ValueError(
                "GateLoopTransformer: state of a layer must have one entry for each of"
                f" {len(self.parts)} mixers, got {len(before)}"
            )
        after = []
        for part, own_state in zip(self.parts, before, strict=True):
            x, own_state = part.residual(x, own_state, packing)
            after.append(own_state)
        return x, tuple(after)

    def make_state(self, batch: int, dtype: Any, length: int | None) -> Any:
        return tuple(part.make_state(batch, dtype, length) for part in self.parts)

    def weights(self) -> Iterator[Weight]:
        for i, part in enumerate(self.parts):
            yield from within("", ("parts", i), part)


class FeedForward(Block):
    norm: Norm
    proj_in: Linear
    proj_out: Linear
    approximate_gelu: bool = eqx.field(static=True)

    @staticmethod
    def make(recipe: Recipe, key: Array, ff_mult: int) -> "FeedForward":
        in_key, out_key = (key, key) if recipe.like_jax else random.split(key)
        inner = recipe.dim * ff_mult
        return FeedForward(
            recipe.norm(),
            recipe.linear(in_key, recipe.dim, inner),
            recipe.linear(out_key, inner, recipe.dim),
            approximate_gelu=recipe.like_jax,
        )

    def mix(self, x: Array, state: Any, packing: Packing | None = None) -> tuple[Array, Any]:
        x = self.proj_in(x)
        return self.proj_out(jax.nn.gelu(x, approximate=self.approximate_gelu)), state

    def weights(self) -> Iterator[Weight]:
        yield from within("1.norm.", ("norm",), self.norm)
        yield from within("1.fn.0.", ("proj_in",), self.proj_in)
        yield from within("1.fn.2.", ("proj_out",), self.proj_out)


# ---- Transitions ---------------------------------------------------------------------------------


def interleave(halves: Array) -> Array:
    """(..., 2 D): the first half real parts, the second imaginary -> (re, im) pairs."""
    pairs = jnp.stack(jnp.split(halves, 2, axis=-1), axis=-1)
    return pairs.reshape(halves.shape)


def drop_imaginary(pairs: Array) -> Array:
    """(..., 2 D) -> the same with im = 0."""
    return pairs * jnp.tile(jnp.array([1, 0], pairs.dtype), pairs.shape[-1] // 2)


def scale_gradient(x: Array, fraction: float) -> Array:
    """x, whose gradient is `fraction` of what it would be."""
    return x if fraction == 1 else _scaled(x, fraction)


@jax.custom_jvp
def _scaled(x: Array, fraction: float) -> Array:
    return x


@_scaled.defjvp
def _scaled_jvp(primals: tuple[Array, float], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, fraction = primals
    return x, tangents[0] * jnp.asarray(fraction, x.dtype)
