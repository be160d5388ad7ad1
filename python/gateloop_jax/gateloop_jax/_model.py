"""The GateLoop Transformer in Equinox, after the two models of gateloop-transformer 0.2.5.

Its parts have the names and layouts of the JAX model there: a matrix is (in, out), `wa` gives the
real parts of all transitions, then the imaginary ones. Shapes: B batch, T time, D channels.
"""

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.typing import ArrayLike

from gateloop_jax._gate_loop import polar_gate_loop
from gateloop_jax._primitive import to_complex

Architecture = Literal["jax", "pytorch"]
State = tuple[Array, ...]


class Linear(eqx.Module):
    weight: Array  # (in, out)
    bias: Array  # (out)

    def __call__(self, x: Array) -> Array:
        return x @ self.weight + self.bias


class RMSNorm(eqx.Module):
    """x √D γ / |x|. `eps` is added to |x|²; with none, |x| is at least 1e-12."""

    gamma: Array  # (D)
    eps: float | None = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        # Squares of float16 overflow from 256 on, and 1e-24 is zero there.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        squares = jnp.maximum(squares, 1e-24) if self.eps is None else squares + self.eps
        y = wide * lax.rsqrt(squares) * (self.gamma * math.sqrt(x.shape[-1]))
        return y.astype(jnp.result_type(x, self.gamma))


class GateLoop(eqx.Module):
    """Mixes in time: y_t = q_t Re(h_t), h_t = a_t h_{t-1} + k_t v_t, then a SiLU gate."""

    norm: RMSNorm
    wq: Array  # (D, D), as wk, wv, wg and wo
    wk: Array
    wv: Array
    wa: Array  # (D, 2 D)
    wg: Array
    wo: Array
    ba: Array | None  # (2 D), or no bias
    frac_gradient_state_transition: float = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        """(B, T, D) -> (B, T, D)."""
        return self.advance(x, None)[0]

    def advance(self, x: Array, state: Array | None) -> tuple[Array, Array]:
        """x (B, T, D), state (B, D) complex -> the output, and the state after it."""
        x = self.norm(x)
        z = _scale_gradient(self._transition(x), self.frac_gradient_state_transition)
        y, state = polar_gate_loop(x @ self.wq, x @ self.wk, x @ self.wv, z, state)
        return (y * jax.nn.silu(x @ self.wg)) @ self.wo, state

    def _transition(self, x: Array) -> Array:
        """(B, T, 2 D), (re, im) interleaved per channel as the kernel reads them."""
        bias = 0 if self.ba is None else interleave(self.ba)
        # What is interleaved is the smaller of the matrix and its product.
        if x.shape[0] * x.shape[1] < x.shape[2]:
            return interleave(x @ self.wa) + bias
        return x @ interleave(self.wa) + bias


class FeedForward(eqx.Module):
    norm: RMSNorm
    proj_in: Linear
    proj_out: Linear
    approximate_gelu: bool = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        x = self.proj_in(self.norm(x))
        return self.proj_out(jax.nn.gelu(x, approximate=self.approximate_gelu))


class GateLoopTransformer(eqx.Module):
    """Ids in, logits out.

    architecture "jax": numbers, and from the same key the weights, of the package's JAX model: tied
        embedding, eps 1e-5 in the norms, approximate GELU. Its initial weights are standard normal
        whatever the width, which trains poorly.
    architecture "pytorch": numbers of the package's PyTorch Transformer and of our C++ one
        (pre-norm, max heads), with PyTorch's initial distributions: a matrix of its own for the
        logits, a bias of the transition, no eps, exact GELU. Checkpoints of those can be loaded and
        saved.
    """

    embedding: Array  # (num_tokens, D)
    norm: RMSNorm
    layers: list[tuple[GateLoop, FeedForward]]
    head: Array | None  # (D, num_tokens), or the embedding's transpose
    architecture: Architecture = eqx.field(static=True)

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        depth: int,
        key: Array,
        ff_mult: int = 4,
        *,
        architecture: Architecture = "jax",
        frac_gradient_state_transition: float | None = None,
    ) -> None:
        """frac_gradient_state_transition: what is let through of the gradient of the transition's
        projection; by default all ("jax") or 0.9 ("pytorch"), as in the package's models."""
        for name, value in dict(num_tokens=num_tokens, dim=dim, ff_mult=ff_mult).items():
            if value < 1:
                raise ValueError(f"GateLoopTransformer: {name} must be positive, got {value}")
        if depth < 0:
            raise ValueError(f"GateLoopTransformer: depth must not be negative, got {depth}")
        if architecture not in ("jax", "pytorch"):
            raise ValueError(
                "GateLoopTransformer: architecture must be 'jax' or 'pytorch',"
                f" got {architecture!r}"
            )
        like_jax = architecture == "jax"
        fraction = frac_gradient_state_transition
        if fraction is None:
            fraction = 1.0 if like_jax else 0.9
        self.architecture = architecture
        self.norm = _norm(dim, like_jax)
        if like_jax:
            # One key for everything, as there: equal shapes get equal numbers.
            self.embedding = random.normal(key, (num_tokens, dim)) * 0.02
            self.head = None
            keys = [(key, key)] * depth
        else:
            embedding_key, head_key, *layer_keys = random.split(key, 2 + 2 * depth)
            self.embedding = random.normal(embedding_key, (num_tokens, dim))
            self.head = _uniform(head_key, (dim, num_tokens), dim)
            keys = list(zip(layer_keys[::2], layer_keys[1::2], strict=True))
        self.layers = [
            (_gate_loop(dim, like_jax, fraction, k), _feed_forward(dim, ff_mult, like_jax, f))
            for k, f in keys
        ]

    @eqx.filter_jit
    def __call__(self, ids: ArrayLike) -> Array:
        """(T,) or (B, T) integers -> (T, num_tokens) or (B, T, num_tokens)."""
        return self._advance(ids, None)[0]

    @eqx.filter_jit
    def advance(self, ids: ArrayLike, state: State) -> tuple[Array, State]:
        """The same from a state on, a prompt or some of a long text: -> logits, the new state."""
        return self._advance(ids, state)

    @eqx.filter_jit
    def step(self, ids: ArrayLike, state: State) -> tuple[Array, State]:
        """One token: () or (B,) integers -> (num_tokens,) or (B, num_tokens), and the new state.

        Costs the same at every position.
        """
        logits, state = self._advance(jnp.asarray(ids)[..., None], state)
        return logits[..., 0, :], state

    def initial_state(self, batch: int | None = None) -> State:
        """What `advance` and `step` begin with: a complex (D,) a layer, or (B, D) for a batch."""
        shape = self.embedding.shape[1:] if batch is None else (batch, self.embedding.shape[1])
        return (jnp.zeros(shape, to_complex(self.embedding.dtype)),) * len(self.layers)

    def _advance(self, ids: ArrayLike, state: State | None) -> tuple[Array, State]:
        ids = jnp.asarray(ids)
        if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                "GateLoopTransformer: ids must be integers (T,) or (B, T),"
                f" got {ids.dtype} of shape {ids.shape}"
            )
        if ids.ndim == 1:
            batched = None if state is None else tuple(s[None] for s in state)
            logits, after = self._advance(ids[None], batched)
            return logits[0], tuple(s[0] for s in after)
        if state is not None and len(state) != len(self.layers):
            raise ValueError(
                f"GateLoopTransformer: state must have one entry for each of {len(self.layers)}"
                f" layers, got {len(state)}"
            )
        x = self.embedding[ids]
        states = []
        for i, (mix, feed_forward) in enumerate(self.layers):
            mixed, last = mix.advance(x, None if state is None else state[i])
            states.append(last)
            x = x + mixed
            x = x + feed_forward(x)
        head = self.embedding.T if self.head is None else self.head
        return self.norm(x) @ head, tuple(states)


# ---- Initial weights -----------------------------------------------------------------------------


def _uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """torch.nn.Linear's."""
    return random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(fan_in)


def _norm(dim: int, like_jax: bool) -> RMSNorm:
    return RMSNorm(jnp.ones(dim), 1e-5 if like_jax else None)


def _linear(fan_in: int, fan_out: int, like_jax: bool, key: Array) -> Linear:
    weight_key, bias_key = random.split(key)
    shape = (fan_in, fan_out)
    if like_jax:
        return Linear(random.normal(weight_key, shape), random.normal(bias_key, (fan_out,)))
    return Linear(_uniform(weight_key, shape, fan_in), _uniform(bias_key, (fan_out,), fan_in))


def _gate_loop(dim: int, like_jax: bool, fraction: float, key: Array) -> GateLoop:
    q, k, v, a, g, o, *bias = random.split(key, 6 if like_jax else 7)

    def matrix(key: Array, width: int = dim) -> Array:
        shape = (dim, width)
        return random.normal(key, shape) if like_jax else _uniform(key, shape, dim)

    return GateLoop(
        norm=_norm(dim, like_jax),
        wq=matrix(q),
        wk=matrix(k),
        wv=matrix(v),
        wa=matrix(a, 2 * dim),
        wg=matrix(g),
        wo=matrix(o),
        ba=_uniform(bias[0], (2 * dim,), dim) if bias else None,
        frac_gradient_state_transition=fraction,
    )


def _feed_forward(dim: int, mult: int, like_jax: bool, key: Array) -> FeedForward:
    in_key, out_key = (key, key) if like_jax else random.split(key)
    return FeedForward(
        _norm(dim, like_jax),
        _linear(dim, dim * mult, like_jax, in_key),
        _linear(dim * mult, dim, like_jax, out_key),
        approximate_gelu=like_jax,
    )


# ---- Arithmetic ----------------------------------------------------------------------------------


def interleave(halves: Array) -> Array:
    """(..., 2 D): the first half real parts, the second imaginary -> (re, im) pairs."""
    pairs = jnp.stack(jnp.split(halves, 2, axis=-1), axis=-1)
    return pairs.reshape(halves.shape)


def _scale_gradient(x: Array, fraction: float) -> Array:
    """x, whose gradient is `fraction` of what it would be."""
    return x if fraction == 1 else _scaled(x, fraction)


@jax.custom_jvp
def _scaled(x: Array, fraction: float) -> Array:
    return x


@_scaled.defjvp
def _scaled_jvp(primals: tuple[Array, float], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, fraction = primals
    return x, tangents[0] * jnp.asarray(fraction, x.dtype)
