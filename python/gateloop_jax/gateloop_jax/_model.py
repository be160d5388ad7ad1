"""The GateLoop Transformer in Equinox, after the two models of gateloop-transformer 0.2.5.

Its parts have the names and layouts of the JAX model there: a matrix is (in, out), `wa` gives the
real parts of all transitions, then the imaginary ones. Shapes: B batch, T time, D channels.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, random
from jax.typing import ArrayLike

from gateloop_jax import _spec
from gateloop_jax._attention import Attention
from gateloop_jax._blocks import FeedForward, Mixer, Mixers, NoNorm, Norm, Recipe, uniform
from gateloop_jax._gate_loop_block import GateLoop
from gateloop_jax._packing import Packing
from gateloop_jax._simple_gate_loop import SimpleGateLoop
from gateloop_jax._time_sharding import AxisName
from gateloop_jax._weights import ROWS, Weight, own, within

Architecture = Literal["jax", "pytorch"]
State = tuple[Any, ...]

MIXERS: dict[str, type[GateLoop] | type[Attention]] = {
    "gate_loop": GateLoop,
    "attention": Attention,
}


class GateLoopTransformer(eqx.Module):
    """Ids in, logits out.

    architecture "jax": numbers, and from the same key the weights, of the package's JAX model: tied
        embedding, eps 1e-5 in the norms, approximate GELU. Its initial weights are standard normal
        whatever the width, which trains poorly.
    architecture "pytorch": numbers of the PyTorch Transformer and of our C++ one, and PyTorch's
        initial distributions. It has every option that says what those compute. Checkpoints of
        those can be loaded and saved.
    """

    embedding: Array  # (num_tokens, D)
    norm: Norm
    layers: list[tuple[Mixer | Mixers, FeedForward]]
    head: Array | None  # (D, num_tokens), or the embedding's transpose
    architecture: Architecture = eqx.field(static=True)
    stored_options: str = eqx.field(static=True)  # JSON, as in config.json

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
        **options: Any,
    ) -> None:
        """frac_gradient_state_transition: what is let through of the gradient of the transition's
        projection; by default all ("jax") or 0.9 ("pytorch"), as in the package's models.

        options, of "pytorch" only: arguments of gateloop_cpp.Transformer, same names and defaults,
        checkpoint_blocks aside. checkpoint_gate_looped_attn: with heads of two and more channels
        the backward pass computes the states again.

        Raises ValueError naming the option, what was expected and what came.
        """
        if architecture not in ("jax", "pytorch"):
            raise ValueError(
                "GateLoopTransformer: architecture must be 'jax' or 'pytorch',"
                f" got {architecture!r}"
            )
        like_jax = architecture == "jax"
        if like_jax:
            if options:
                raise ValueError(
                    "GateLoopTransformer: architecture must be 'pytorch' for the options"
                    f" {', '.join(options)}, got 'jax'"
                )
            options["tie_embeddings"] = True
        options |= dict(num_tokens=num_tokens, dim=dim, depth=depth, ff_mult=ff_mult)
        if frac_gradient_state_transition is not None or like_jax:
            fraction = frac_gradient_state_transition
            options["frac_gradient_state_transition"] = 1.0 if fraction is None else fraction
        self.architecture = architecture
        self.stored_options = _spec.stored(options)
        spec = _spec.describe(self.stored_options)
        recipe = Recipe(
            dim,
            like_jax,
            post_norm=spec["post_norm"],
            ablate_complex=spec["ablate_complex"],
            ablate_state_transition=spec["ablate_state_transition"],
        )
        # Post-norm blocks leave a normalised output.
        self.norm = NoNorm() if recipe.post_norm else recipe.norm()
        if like_jax:
            # One key for everything, as there: equal shapes get equal numbers.
            embedding_key, head_key, *layer_keys = [key] * (2 + 2 * depth)
        else:
            embedding_key, head_key, *layer_keys = random.split(key, 2 + 2 * depth)
        tied = spec["tie_embeddings"]
        # Of an embedding that is tied and normalised, "pytorch": logits of unit variance.
        scale = 0.02 if like_jax else dim**-0.5 if tied else 1
        self.embedding = random.normal(embedding_key, (num_tokens, dim)) * scale
        self.head = None if tied else uniform(head_key, (dim, num_tokens), dim)
        self.layers = [
            _layer(recipe, mix_key, feed_key, **layer)
            for mix_key, feed_key, layer in zip(
                layer_keys[::2], layer_keys[1::2], spec["layers"], strict=True
            )
        ]

    @classmethod
    def from_options(cls, options: Mapping[str, Any], key: Array) -> "GateLoopTransformer":
        """The "pytorch" model of options as in config.json; what is left out has its default."""
        return cls(**json.loads(_spec.stored(options)), key=key, architecture="pytorch")

    @property
    def options(self) -> dict[str, Any]:
        """What from_options takes, as config.json holds it."""
        return dict(json.loads(self.stored_options))

    @eqx.filter_jit
    def __call__(
        self,
        ids: ArrayLike,
        segment_ids: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        axis_name: AxisName | None = None,
    ) -> Array:
        """(T,) or (B, T) integers -> (T, num_tokens) or (B, T, num_tokens).

        segment_ids: integers of the shape of ids: steps of one number side by side are a sequence,
            independent of the others. mask: bool, false at padding, on which no other step
            depends; the logits there have no meaning.
        axis_name: of the mesh axis, or axes, that shard time inside jax.shard_map, as in
            linear_recurrence. A ValueError where a layer is attention without a window, or with one
            and a mask.
        """
        return self._advance(ids, None, segment_ids, mask, axis_name)[0]

    @eqx.filter_jit
    def advance(
        self,
        ids: ArrayLike,
        state: State,
        segment_ids: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        num_segments: int | None = None,
    ) -> tuple[Array, State]:
        """The same from a state on, a prompt or some of a long text: -> logits, the new state.

        num_segments: N, static: `state` is that of initial_state(num_segments=N), one for each
            number 0 to N - 1 of segment_ids, as linear_recurrence has them. A ValueError where a
            layer is attention, with any of the three.
        """
        return self._advance(ids, state, segment_ids, mask, num_segments=num_segments)

    @eqx.filter_jit
    def step(self, ids: ArrayLike, state: State) -> tuple[Array, State]:
        """One token: () or (B,) integers -> (num_tokens,) or (B, num_tokens), and the new state.

        Costs the same at every position.
        """
        logits, state = self._advance(jnp.asarray(ids)[..., None], state)
        return logits[..., 0, :], state

    def initial_state(
        self,
        batch: int | None = None,
        length: int | None = None,
        num_segments: int | None = None,
    ) -> State:
        """What `advance` and `step` begin with; every array in it begins with the batch, if any.

        One entry a layer: of GateLoop (D,), complex, or real where its transitions are, and
        (heads, d, d) with heads of d > 1 channels; KeysValues of attention; () of a layer without a
        mixer; a pair where a simple gate loop, (D,), is in front.
        length: of the longest sequence to be read. Attention without a window keeps all of it, and
            needs the length; where more is read, its logits are not a number.
        num_segments: N, of packed sequences: of N in each of the batch, (B, N, ...) or (N, ...).
        """
        rows = 1 if batch is None else batch
        count = rows * (1 if num_segments is None else num_segments)
        states = tuple(
            mix.make_state(count, self.embedding.dtype, length) for mix, _ in self.layers
        )
        if num_segments is not None:
            shape = (rows, num_segments)
            states = jax.tree.map(lambda s: s.reshape(*shape, *s.shape[1:]), states)
        return _alone(states) if batch is None else states

    def _advance(
        self,
        ids: ArrayLike,
        state: State | None,
        segment_ids: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        axis_name: AxisName | None = None,
        num_segments: int | None = None,
    ) -> tuple[Array, State]:
        ids = jnp.asarray(ids)
        if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                "GateLoopTransformer: ids must be integers (T,) or (B, T),"
                f" got {ids.dtype} of shape {ids.shape}"
            )
        if ids.ndim == 1:
            state, segment_ids, mask = jax.tree.map(
                lambda s: jnp.asarray(s)[None], (state, segment_ids, mask)
            )
            rest = (segment_ids, mask, axis_name, num_segments)
            logits, after = self._advance(ids[None], state, *rest)
            return logits[0], _alone(after)
        if state is not None and len(state) != len(self.layers):
            raise ValueError(
                f"GateLoopTransformer: state must have one entry for each of {len(self.layers)}"
                f" layers, got {len(state)}"
            )
        packing = Packing.of(
            "GateLoopTransformer", ids.shape, segment_ids, mask, axis_name, num_segments
        )
        x = self.embedding[ids]
        states = []
        for i, (mix, feed_forward) in enumerate(self.layers):
            x, last = mix.residual(x, None if state is None else state[i], packing)
            states.append(last)
            x, _ = feed_forward.residual(x, None)
        head = self.embedding.T if self.head is None else self.head
        return self.norm(x) @ head, tuple(states)

    def weights(self) -> Iterator[Weight]:
        """The leaves by their names in the PyTorch Transformer's state_dict."""
        yield from own(self, "token_emb.weight", "embedding", layout=ROWS)
        for i, (mix, feed_forward) in enumerate(self.layers):
            yield from within(f"layers.{i}.", ("layers", i, 0), mix)
            yield from within(f"layers.{i}.", ("layers", i, 1), feed_forward)
        yield from within("to_logits.0.", ("norm",), self.norm)
        alone = isinstance(self.norm, NoNorm)
        yield from own(self, "to_logits.weight" if alone else "to_logits.1.weight", "head")


def _alone(states: State) -> State:
    """Of a batch of one, without the batch."""
    return tuple(jax.tree.map(lambda s: s[0], states))


def _layer(
    recipe: Recipe,
    mix_key: Array,
    feed_key: Array,
    *,
    mixer: str,
    simple_gate_loop: Mapping[str, bool] | None,
    ff_mult: int,
    **options: Any,
) -> tuple[Mixer | Mixers, FeedForward]:
    """The fields of LayerSpec in include/gateloop/model.h, with those of its mixer."""
    feed_forward = FeedForward.make(recipe, feed_key, ff_mult)
    if simple_gate_loop is None and mixer in MIXERS:
        return MIXERS[mixer].make(recipe, mix_key, **options), feed_forward
    parts: list[Mixer] = []
    if simple_gate_loop is not None:
        mix_key, simple_key = random.split(mix_key)
        parts.append(SimpleGateLoop.make(recipe, simple_key, **simple_gate_loop))
    if mixer in MIXERS:
        parts.append(MIXERS[mixer].make(recipe, mix_key, **options))
    return Mixers(tuple(parts)), feed_forward
