"""Decoding at full speed, outside of the modules."""

import copy
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp._checks import expect
from gateloop_cpp._spec import describe
from gateloop_cpp._untouched import difference
from gateloop_cpp.transformer import Cache, Reader, Transformer

# Parameters of a layer in the order in which the operator takes them; {} is the norm's gain.
_LAYER = (
    "0.norm.{}",
    "0.norm.bias",
    "0.fn.to_qkv.weight",
    "0.fn.to_a.0.weight",
    "0.fn.to_a.0.bias",
    "0.fn.maybe_sub_ln.weight",
    "0.fn.maybe_sub_ln.bias",
    "0.fn.to_gates.0.weight",
    "0.fn.to_out.weight",
    "1.norm.{}",
    "1.norm.bias",
    "1.fn.0.weight",
    "1.fn.0.bias",
    "1.fn.2.weight",
    "1.fn.2.bias",
)


class Decoder:
    """Reads tokens after tokens, without gradients, as ``model(ids, cache, return_cache=True)``.

    It holds the weights that ``model`` has now, and goes past its modules. Tensors put in the place
    of a parameter later are not seen; a parameter that changes in place makes the results
    undefined, since some weights are copied and others are not: then build another decoder.

    One token of one sequence is one operator with max heads; its matrices move to large pages
    (Linux), at the same addresses. Two and more sequences together read a copy of the matrices in
    the layout of oneDNN's products, made when they first come.

    Args:
        model: an untouched Transformer: its modules are what its options make them, without hooks,
            wrappers or adapters, its parameters plain tensors of one dtype on the CPU. Autocast is
            off.

    Raises:
        ValueError: naming what was found changed. The model itself then reads the tokens.
    """

    def __init__(self, model: Transformer) -> None:
        found = difference(model, Transformer)
        expect(found is None, "Decoder", "model", "an untouched Transformer", found)
        # Modules of its own around the same parameters.
        self._model = copy.deepcopy(model, {id(p): p.detach() for p in model.parameters()})
        for module in list(self._model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, _Product(child))
        self._step = _StepWeights(model) if _takes_steps(model) else None
        self._in_large_pages = False

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """ids (B, T) and the cache of the tokens before them, to logits (B, T, num_tokens) and the
        cache after them, which continues in ``model`` too. Errors are those of the model.
        """
        one_token = ids.shape == (1, 1) and ids.dtype in (torch.int64, torch.int32)
        if one_token and not self._in_large_pages:
            for module in self._model.modules():
                if isinstance(module, _Product):
                    torch.ops.gateloop._move_to_large_pages(module.weight)
            self._in_large_pages = True
        if one_token and self._step is not None and cache is not None:
            return self._step(ids, cache)
        return cast(tuple[Tensor, Cache], self._model(ids, cache=cache, return_cache=True))


def fastest_reader(model: Transformer) -> Reader:
    """A Decoder of an untouched model, else the model itself."""
    if difference(model, Transformer) is None:
        return Decoder(model)
    return partial(model, return_cache=True)


class _Product(nn.Module):
    """A linear layer on (B, T, in): one row and many sequences meet products of their own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() == 1:
            return cast(Tensor, torch.ops.gateloop._linear(x, self.weight, self.bias))
        if x.shape[0] == 1:  # a prompt, read once
            return F.linear(x, self.weight, self.bias)
        if self.packed is None:
            self.packed = torch.ops.gateloop._packed(self.weight)
        return cast(Tensor, torch.ops.gateloop._linear(x, self.packed, self.bias))


def _takes_steps(model: Transformer) -> bool:
    """Whether all layers are the same GateLoop with max heads, and nothing else."""
    layers = describe(model.options)["layers"]
    ablated = model.ablate_complex or model.ablate_state_transition
    if not layers or ablated or any(layer != layers[0] for layer in layers):
        return False
    layer = layers[0]
    plain = layer["mixer"] == "gate_loop" and layer["simple_gate_loop"] is None
    return plain and layer["heads"] == layer["dim_inner"] and not layer["joint_kv"]


class _StepWeights:
    """One token of one sequence through the whole model, as one operator."""

    def __init__(self, model: Transformer) -> None:
        o = model.options
        parameters = dict(model.named_parameters(remove_duplicate=False))
        gain = "weight" if o["post_ln_norm"] else "gamma"
        names = ["token_emb.weight", "to_logits.0.gamma"]
        names.append("to_logits.weight" if o["post_ln_norm"] else "to_logits.1.weight")
        for i in range(len(model.layers)):
            names += [f"layers.{i}.{name.format(gain)}" for name in _LAYER]
        found = (parameters.get(name) for name in names)
        self._weights = [None if p is None else p.detach() for p in found]
        self._options = o["post_ln_norm"], o["gate"] == "sigmoid", o["normalize_input"]

    def __call__(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        result: Any = torch.ops.gateloop._transformer_step(
            ids, self._weights, list(cache), *self._options
        )
        logits, states = result
        return cast(Tensor, logits), tuple(states)
