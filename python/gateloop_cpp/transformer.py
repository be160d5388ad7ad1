"""The GateLoop Transformer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gateloop_cpp import _spec
from gateloop_cpp._checks import expect, expect_packing
from gateloop_cpp._packing import IGNORED, next_tokens, next_tokens_over
from gateloop_cpp._sharded import Shards
from gateloop_cpp.causal_full_attention import CausalFullAttention
from gateloop_cpp.distributed import Group
from gateloop_cpp.feed_forward import FeedForward
from gateloop_cpp.gate_looped_attention import (
    FeatureMap,
    Gate,
    GateLoopedAttention,
    NormalizeInput,
)
from gateloop_cpp.residual import PostNorm, PreNorm
from gateloop_cpp.rms_norm import RMSNorm
from gateloop_cpp.sampling import Sampler
from gateloop_cpp.simple_gate_loop_layer import SimpleGateLoopLayer

_NAME = "Transformer"
# Locals of the constructor that say nothing about what the model computes.
_NOT_OPTIONS = ("self", "__class__", "checkpoint_blocks")

# One entry a layer: what its spatial mixer's cache is, None in a layer without one. With a simple
# gate loop: a pair of that layer's cache and the mixer's.
Cache = tuple[Any, ...]
# (ids, the cache that it returned before or None, cu_seqlens=None) to the logits (B, num_tokens)
# after the last token of each sequence, and the cache.
Reader = Callable[..., tuple[Tensor, Any]]


class Transformer(nn.Module):
    """Token embedding, ``depth`` layers of a spatial mixer and a feed-forward, logits.

    Arguments, defaults and state_dict keys are the reference's. Those from ``gate`` on are ours;
    their defaults leave its model unchanged.

    Args:
        dim: channels between the layers.
        num_tokens: size of the vocabulary.
        depth: number of blocks.
        dim_head, heads: of full attention only.
        ff_mult: inner width of the feed-forward, in multiples of dim.
        checkpoint_gate_looped_attn: see GateLoopedAttention.
        use_gate_looped_attn: GateLoop as the spatial mixer, else full attention.
        gate_loop_heads: default max heads, one per channel.
        attn_add_swish_gating: SiLU gates on the mixer's output.
        dim_gate_looped_attn: inner width of GateLoop; default dim.
        attn_softmax_normalize: default: not data_dependent_rel_pos.
        data_dependent_rel_pos: see CausalFullAttention.
        frac_gradient_state_transition: the share of the gradient that reaches the transition.
        ablate_complex, ablate_state_transition: defaults of the forward pass.
        rotary_emb: rotary positions in full attention.
        post_ln_norm: LayerNorm after each residual instead of RMSNorm before each layer.
        sub_ln: LayerNorm on GateLoop's output.
        gate, normalize_input, transition_bias, joint_kv, per_key_transitions, feature_map,
            phase_bias: see GateLoopedAttention.
        gate_loop_dim_key: dim_key of GateLoopedAttention.
        window: see CausalFullAttention.
        layers: the mixer of each layer, instead of use_gate_looped_attn: a pattern such as
            "gate_loop*2,attention", or a list; both are repeated to the depth. Entries are
            "gate_loop", "attention", "none" (a feed-forward alone), and mappings
            {"mixer": name, ...} with what differs from the arguments here: simple_gate_loop,
            ff_mult and, but for dim, the arguments of GateLoopedAttention or CausalFullAttention.
        simple_gate_loop: in front of every mixer a SimpleGateLoopLayer, x = layer(x) + x: True, or
            a mapping of its prenorm and post_ln.
        tie_embeddings: the logits are products with the token embedding.
        checkpoint_blocks: keep of each mixer and feed-forward, with its norm and residual, only the
            input. The backward pass runs it again (``torch.utils.checkpoint``; hooks inside then
            fire twice). An attribute too: how a model is trained, no part of ``options``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        checkpoint_gate_looped_attn: bool = True,
        use_gate_looped_attn: bool = True,
        gate_loop_heads: int | None = None,
        attn_add_swish_gating: bool = True,
        dim_gate_looped_attn: int | None = None,
        attn_softmax_normalize: bool | None = None,
        data_dependent_rel_pos: bool = False,
        frac_gradient_state_transition: float = 0.9,
        ablate_complex: bool = False,
        ablate_state_transition: bool = False,
        rotary_emb: bool = False,
        post_ln_norm: bool = False,
        sub_ln: bool = False,
        gate: Gate = "polar",
        normalize_input: NormalizeInput = False,
        transition_bias: tuple[float, float] | None = None,
        joint_kv: bool = False,
        gate_loop_dim_key: int | None = None,
        per_key_transitions: bool = False,
        feature_map: FeatureMap = "none",
        phase_bias: tuple[float, float] | None = None,
        window: int | None = None,
        layers: str | Sequence[str | Mapping[str, Any]] | None = None,
        simple_gate_loop: bool | Mapping[str, bool] | None = None,
        tie_embeddings: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        options = _in_full({k: v for k, v in locals().items() if k not in _NOT_OPTIONS})
        if isinstance(layers, list | tuple):
            options["layers"] = [_in_full(e) if isinstance(e, Mapping) else e for e in layers]
        super().__init__()
        spec = _spec.describe(options)
        #: The arguments that say what the model computes, by name: what config.json holds.
        self.options: dict[str, Any] = options
        self.ablate_complex = ablate_complex
        self.ablate_state_transition = ablate_state_transition
        self.checkpoint_blocks = checkpoint_blocks

        # In the reference's order, so that one seed gives both the same weights.
        around = PostNorm if post_ln_norm else PreNorm
        self.token_emb = nn.Embedding(num_tokens, dim)
        layers_ = []
        for layer in spec["layers"]:
            simple, ff_mult = layer.pop("simple_gate_loop"), layer.pop("ff_mult")
            mix, feed = _mixer(dim, **layer), FeedForward(dim, ff_mult)
            block: list[nn.Module] = [
                nn.Identity() if mix is None else around(dim, mix),
                around(dim, feed),
            ]
            if simple is not None:
                block.append(SimpleGateLoopLayer(dim, **simple))
            layers_.append(nn.ModuleList(block))
        self.layers = nn.ModuleList(layers_)
        # Post-norm blocks leave a normalised output.
        to_logits = nn.Linear(dim, num_tokens, bias=False)
        if tie_embeddings:
            # Logits of unit variance at the start: what they multiply is normalised.
            nn.init.normal_(self.token_emb.weight, std=dim**-0.5)
            to_logits.weight = self.token_emb.weight
        self.to_logits = to_logits if post_ln_norm else nn.Sequential(RMSNorm(dim), to_logits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Moving to some devices makes parameters anew: those tied to each other stay so."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for first, *others in names.values():
            for path, _, name in (other.rpartition(".") for other in others):
                setattr(self.get_submodule(path), name, self.get_parameter(first))
        return self

    def forward(
        self,
        x: Tensor,
        return_loss: bool = False,
        ablate_complex: bool | None = None,
        ablate_state_transition: bool | None = None,
        cache: Cache | None = None,
        return_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        time_group: Group | None = None,
    ) -> Any:
        """Logits, or the mean loss of predicting each token from those before it.

        Args:
            x: (B, T) int64 or int32 ids in [0, num_tokens).
            return_loss: cross-entropy in nats of x[:, 1:] given x[:, :-1]; needs T ≥ 2. Of packed
                or padded sequences each token but the first is given those before it in its
                sequence; where no sequence has two, the mean of nothing is NaN.
            ablate_complex, ablate_state_transition: default: as the model was built.
            cache: what an earlier call returned for the tokens before these. A sequence cut
                anywhere and carried through its cache gives what one call gives. The cost of a
                token is constant for GateLoop and grows with the tokens before it for attention.
            return_cache: return (logits, cache) instead of logits.
            cu_seqlens, mask: packed or padded sequences, see :mod:`gateloop_cpp.ops`. A cache then
                has a row for each sequence; attention has none. Logits at padding say nothing.
            time_group: the processes that hold a block of time each, see
                :mod:`gateloop_cpp.distributed`; without a cache, and with attention over windows
                alone. The last token of a block is given the first of the next one. A process's
                loss is its share: the sum over processes is the mean loss of the whole, and the sum
                of their gradients its gradient.

        Returns:
            Logits (B, T, num_tokens), or a loss (), or (logits, cache).

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
            IndexError: for ids outside of the vocabulary.
        """
        self._check_ids(x)
        if return_loss:
            alone = cache is None and not return_cache
            expect(alone, _NAME, "return_loss", "False with cache or return_cache", True)
            enough = x.shape[1] >= 2 or time_group is not None
            expect(enough, _NAME, "x", "(B, T) with T >= 2 for a loss", x)
        expect_packing(_NAME, x, cu_seqlens, mask, of_block=time_group is not None)
        if time_group is not None:
            expect(cache is None, _NAME, "cache", "None over a time_group", cache)
            expect(not return_cache, _NAME, "return_cache", "False over a time_group", True)
        packing: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "mask": mask,
            "time_group": time_group,
        }
        # Left out where they say nothing: a layer of somebody else's need not have them.
        packing = {argument: given for argument, given in packing.items() if given is not None}
        targets = None  # over all processes
        if return_loss and time_group is not None:
            labels, targets = next_tokens_over(time_group, x, cu_seqlens, mask)
        elif return_loss:
            labels = next_tokens(x, cu_seqlens, mask)
            x = x if packing else x[:, :-1]
        layers = len(self.layers)
        fits = cache is None or (isinstance(cache, tuple | list) and len(cache) == layers)
        expect(fits, _NAME, "cache", f"one entry for each of {layers} layers", cache)
        options: dict[str, Any] = {
            "ablate_complex": self.ablate_complex if ablate_complex is None else ablate_complex,
            "ablate_state_transition": self.ablate_state_transition
            if ablate_state_transition is None
            else ablate_state_transition,
            "return_cache": return_cache,
            **packing,
        }

        h: Any = self.token_emb(x)  # the residual stream, as _run takes and gives it
        caches = []
        for i, block in enumerate(self.layers):
            before = None if cache is None else cache[i]
            h, carried = self._layer(cast(nn.ModuleList, block), h, before, options)
            caches.append(carried)
        logits = self._logits(h)
        if return_loss:
            logits, labels = logits[:, : labels.shape[1]].flatten(0, 1), labels.flatten()
            if targets is None:
                return F.cross_entropy(logits, labels, ignore_index=IGNORED)
            share = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            return share / targets
        return (logits, tuple(caches)) if return_cache else logits

    @property
    def logits_weight(self) -> str:
        """The name of the matrix that gives the logits; with tie_embeddings the embedding's too."""
        return "to_logits.weight" if self.options["post_ln_norm"] else "to_logits.1.weight"

    def _layer(
        self, block: nn.ModuleList, h: Any, cache: Any, options: dict[str, Any]
    ) -> tuple[Any, Any]:
        """h after one layer, and the layer's cache, None unless it is asked for."""
        mix, feed, *simple = block
        if simple:
            pair = cache is None or (isinstance(cache, tuple | list) and len(cache) == 2)
            expect(pair, _NAME, "cache", "a pair of caches in a layer with two", cache)
            before, cache = (None, None) if cache is None else cache
            kept = options["return_cache"]
            shared = {k: v for k, v in options.items() if not k.startswith("ablate")}
            y = self._run(simple[0], h, cache=before, **shared)
            y, before = y if kept else (y, None)
            h = self._add(h, y)
        carried = None
        if isinstance(mix, nn.Identity):
            h = self._run(mix, h)
        else:
            h = self._run(mix, h, cache=cache, **options)
            if options["return_cache"]:
                h, carried = h
        return self._run(feed, h), (before, carried) if simple else carried

    def _run(self, block: nn.Module, x: Any, **options: Any) -> Any:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)

    def _add(self, x: Any, y: Tensor) -> Any:
        return x + y

    def _logits(self, x: Any) -> Tensor:
        return cast(Tensor, self.to_logits(x))

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        generator: torch.Generator | None = None,
        cu_seqlens: Tensor | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Continue ``prompt`` by ``length`` tokens; one step for each.

        A :class:`~gateloop_cpp.Decoder` reads an untouched model; any other model's modules are
        called. Of a model that is sharded over processes all of them have to call this. Each passes
        a prompt, a length and a seed of its own.

        Args:
            prompt: (B, T) ids, T ≥ 1.
            length: how many tokens to add at most: fewer where every sequence has ended.
            temperature, filter_thres, generator, sampling: see :class:`~gateloop_cpp.Sampler`.
                The same seed draws the same tokens as ``gateloop generate --seed``.
            cu_seqlens: (N + 1): the prompt is (1, T), of N prompts of different lengths packed one
                after another, see :mod:`gateloop_cpp.ops`; at least one token of each. Modules of
                attention do not take it: then the model has to be untouched.

        Returns:
            Ids (B or N, length or fewer) without the prompt, ``Sampler.ENDED`` after a sequence's
            end.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        from gateloop_cpp.decoder import fastest_reader  # which needs this module

        self._check_ids(prompt, "prompt")
        expect(prompt.shape[1] >= 1, _NAME, "prompt", "(B, T) with T >= 1", prompt)
        expect(length >= 0, _NAME, "length", "zero or more", length)
        sampler = Sampler(temperature, filter_thres, generator=generator, **sampling)
        sampler.read(prompt, cu_seqlens)
        read = fastest_reader(self)
        shards = Shards(self.parameters())
        drawn: list[Tensor] = []
        step, cache, packing = prompt, None, {"cu_seqlens": cu_seqlens}
        while shards.any(unfinished := len(drawn) < length and not sampler.ended()):
            logits, after = read(step, cache, **packing)
            if not unfinished:  # but another process, which needs the shards of this one
                continue
            cache = after
            tokens = sampler.draw(logits).to(prompt)
            drawn.append(tokens)
            # A sequence that has ended goes on with any token: nothing reads its logits.
            step, packing = tokens.clamp(min=0).unsqueeze(1), {}
        sequences = prompt.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return torch.stack(drawn, 1) if drawn else prompt.new_empty(sequences, 0)

    def _check_ids(self, x: Tensor, argument: str = "x") -> None:
        integer = x.dtype in (torch.int64, torch.int32)
        expect(integer, _NAME, argument, "int64 or int32 ids", x, TypeError)
        expect(x.ndim == 2, _NAME, argument, "(B, T)", x)
        # On an accelerator reading the bounds would stall the queue; its embedding kernel asserts.
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
            return
        # Under torch.func.vmap nothing can be read; the embedding refuses ids out of bounds.
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        low, high = (int(bound) for bound in x.aminmax())
        size = self.options["num_tokens"]
        if low < 0 or high >= size:
            outside = low if low < 0 else high
            raise IndexError(f"{_NAME}: {argument} must be in [0, {size}), got {outside}")


def _in_full(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with a mapping or None in place of a bool simple_gate_loop."""
    given = options.get("simple_gate_loop")
    if not isinstance(given, bool):
        return dict(options)
    return {**options, "simple_gate_loop": {} if given else None}


def _mixer(dim: int, mixer: str, derived: object = None, **options: Any) -> nn.Module | None:
    if mixer == "gate_loop":
        return GateLoopedAttention(dim, **options)
    return CausalFullAttention(dim, **options) if mixer == "attention" else None
