"""What the mixers of a Transformer compute with, recorded by hooks while it reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gateloop_cpp.causal_full_attention import CausalFullAttention
from gateloop_cpp.gate_looped_attention import GateLoopedAttention
from gateloop_cpp.inspection.influence import WINDOW
from gateloop_cpp.simple_gate_loop_layer import SimpleGateLoopLayer
from gateloop_cpp.transformer import Transformer
from gateloop_cpp.transition import drop_imaginary, input_scale, rate_and_phase


@dataclass
class Steps:
    """T consecutive steps of one mixer, at least float32.

    Of a GateLoop, C is its channels with max heads and its heads else. Attention has no rate.
    """

    query: Tensor  # (T, C), or of wide heads and attention (T, H, K)
    key: Tensor  # as query; with max heads k v, the recurrence's scaled input
    value: Tensor | None  # (T, H, V); None with max heads
    rate: Tensor | None  # (T, C): -ln|a|
    phase: Tensor | None  # (T, C); None where a is real
    initial_state: Tensor | None  # before the first step, a batch of one; None is zero
    window: int | None = None  # of attention: the steps it looks back at


@dataclass
class Source:
    """A mixer whose steps can be shown."""

    layer: int
    kind: str
    channels: int
    is_max_heads: bool
    module: nn.Module
    steps: Callable[["_Record"], Steps]

    @property
    def has_transitions(self) -> bool:
        return not isinstance(self.module, CausalFullAttention)


@dataclass
class NotShown:
    """A mixer whose steps cannot be shown, and the option that prevents it."""

    layer: int
    kind: str
    reason: str


@dataclass
class _Record:
    """Of the last call of a mixer: its options, and the outputs of its submodules by name."""

    options: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def copy(self) -> "_Record":
        return _Record(dict(self.options), dict(self.outputs))


def find_sources(model: Transformer) -> tuple[list[Source], list[NotShown]]:
    """The mixers of a model from the first layer to the last."""
    sources: list[Source] = []
    others: list[NotShown] = []
    for i, block in enumerate(model.layers):
        mix, _, *simple = cast(nn.ModuleList, block)
        if simple:
            sources.append(_simple_source(i, cast(SimpleGateLoopLayer, simple[0])))
        mixer = None if isinstance(mix, nn.Identity) else mix.fn
        if isinstance(mixer, GateLoopedAttention):
            found = _gate_loop_source(i, mixer)
        elif isinstance(mixer, CausalFullAttention):
            found = _attention_source(i, mixer)
        else:
            found = NotShown(i, "none", "no mixer")
        if isinstance(found, Source):
            sources.append(found)
        else:
            others.append(found)
    return sources, others


def _simple_source(layer: int, module: SimpleGateLoopLayer) -> Source:
    def steps(record: _Record) -> Steps:
        q, kv, z = _wide(record.outputs["to_qkva"][0]).chunk(3, dim=-1)
        rate, _ = rate_and_phase(z, "sigmoid")
        cache = record.options.get("cache")
        state = None if cache is None else _wide(cache[1].view(1, -1))
        return Steps(q, kv, None, rate, None, state)

    return Source(layer, "simple_gate_loop", module.dim, True, module, steps)


def _gate_loop_source(layer: int, module: GateLoopedAttention) -> Source | NotShown:
    kind = "gate_loop"
    if module.per_key_transitions:
        return NotShown(layer, kind, "per_key_transitions: a head has more than one transition")
    if module.feature_map != "none":
        return NotShown(layer, kind, f"feature_map={module.feature_map}: keys are expanded")
    is_max_heads = len(module.state_shape) == 1
    steps = _max_head_steps if is_max_heads else _wide_head_steps
    return Source(
        layer, kind, module.heads, is_max_heads, module, lambda record: steps(module, record)
    )


def _max_head_steps(module: GateLoopedAttention, record: _Record) -> Steps:
    parts = _wide(record.outputs["to_qkv"][0]).chunk(2 if module.joint_kv else 3, dim=-1)
    query = parts[0]
    key = parts[1] if module.joint_kv else parts[1] * parts[2]
    rate, phase, scale = _transitions(module, record, key)
    return Steps(query, key * scale, None, rate, phase, record.options.get("cache"))


def _wide_head_steps(module: GateLoopedAttention, record: _Record) -> Steps:
    widths = (module.dim_key, module.dim_key, module.dim_inner)
    qkv = _wide(record.outputs["to_qkv"][0]).split(widths, dim=-1)
    query, key, value = (t.unflatten(-1, (module.heads, -1)) for t in qkv)
    rate, phase, scale = _transitions(module, record, key[..., 0])
    key = key * scale.unsqueeze(-1)
    return Steps(query, key, value, rate, phase, record.options.get("cache"))


def _transitions(
    module: GateLoopedAttention, record: _Record, like: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rates, phases, and what normalize_input scales keys by, (T, C) as ``like``."""
    if record.options["ablate_state_transition"]:
        return torch.zeros_like(like), None, torch.ones_like(like)
    z = record.outputs["to_a"][0]
    if record.options["ablate_complex"] and module.gate != "sigmoid":
        z = drop_imaginary(z)
    rate, phase = rate_and_phase(z, module.gate)
    if module.normalize_input == "none":
        return rate, phase, torch.ones_like(like)
    return rate, phase, input_scale(z, module.gate, module.normalize_input)


def _attention_source(layer: int, module: CausalFullAttention) -> Source | NotShown:
    kind = "attention"
    if module.data_dependent_rel_pos:
        return NotShown(layer, kind, "data_dependent_rel_pos: weights are scaled by channel")
    if not module.softmax_normalize:
        return NotShown(layer, kind, "attn_softmax_normalize=False: weights are no shares")
    if module.window is None or module.window > WINDOW:
        reason = f"window={module.window}: weights reach further than {WINDOW} bytes"
        return NotShown(layer, kind, reason)
    window = module.window
    heads = int(cast(nn.Unflatten, module.to_qkv[1]).unflattened_size[1])

    def steps(record: _Record) -> Steps:
        q, k, v = _wide(record.outputs["to_qkv"]).permute(2, 0, 3, 1, 4)
        if module.rotary_emb is not None:
            cache = record.options.get("cache")
            past = 0 if cache is None else cache[2]
            q, k = module.rotary_emb(q, past), module.rotary_emb(k, past)
        q, k, v = (t[0].transpose(0, 1) for t in (q * module.scale, k, v))
        return Steps(q, k, v, None, None, None, window)

    return Source(layer, kind, heads, False, module, steps)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


@contextmanager
def recording(sources: list[Source]) -> Iterator[Callable[[Source], Callable[[], Steps]]]:
    """While it is open, a function that takes what the model's last call left of a source.

    What it takes is a function to the steps, which may be called during the model's next call.
    """
    records = {id(source): _Record() for source in sources}
    handles = []
    for source in sources:
        record = records[id(source)]

        def note_options(_m: Any, _args: Any, options: Any, record: _Record = record) -> None:
            record.options = options

        handles.append(source.module.register_forward_pre_hook(note_options, with_kwargs=True))
        for name in ("to_qkv", "to_a", "to_qkva"):
            if not hasattr(source.module, name):
                continue

            def note_output(
                _m: Any, _args: Any, output: Tensor, record: _Record = record, name: str = name
            ) -> None:
                record.outputs[name] = output

            handles.append(getattr(source.module, name).register_forward_hook(note_output))
    try:
        yield lambda source: partial(source.steps, records[id(source)].copy())
    finally:
        for handle in handles:
            handle.remove()
