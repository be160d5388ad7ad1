"""Whether a Transformer still is what its options make it."""

from typing import Any

import torch
from torch import nn

from gateloop_cpp import _watchers
from gateloop_cpp.fusion import plain_class

# Attributes without effect on a result: weights and children, compared by themselves; the mode of
# layers that have none; recomputation; hooks on loading and saving.
_WITHOUT_EFFECT = {
    "_parameters",
    "_modules",
    "training",
    "checkpoint_blocks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}


def difference(model: Any, cls: type[Any]) -> str | None:
    """What code that computes the result of ``model`` from its weights would miss; None: nothing.

    An untouched model is a ``cls`` with the modules, types and attributes that its ``options`` give
    it. It has no hooks, local or global, and no ``forward`` of an instance. Its parameters are
    plain, of one dtype and on the CPU. It is called outside of autocast and of torch's transforms
    and modes. Values of parameters, ties between them, ``train()`` and ``fuse()`` make no
    difference.
    """
    if plain_class(type(model)) is not cls:
        return f"the type {type(model).__qualname__}"
    with torch.device("meta"):
        plain = cls(**model.options)
    dtype = model.token_emb.weight.dtype
    if dtype.is_floating_point:
        plain.to(dtype)
    return _of_place() or _of_modules(model, plain) or _of_parameters(model, plain)


def _of_place() -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode that sees torch's operators"
    return _watchers.of_all_modules()


def _of_modules(model: nn.Module, plain: nn.Module) -> str | None:
    modules, expected = (dict(m.named_modules(remove_duplicate=False)) for m in (model, plain))
    if modules.keys() != expected.keys():
        return f"the modules {sorted(modules.keys() ^ expected.keys())}"
    for name, module in modules.items():
        ours, theirs = vars(module), vars(expected[name])
        if plain_class(type(module)) is not type(expected[name]):
            return f"{name}, of type {type(module).__qualname__}"
        for key in (ours.keys() | theirs.keys()) - _WITHOUT_EFFECT:
            if key not in ours or key not in theirs or ours[key] != theirs[key]:
                return f"the attribute {key} of {name or 'the model'}"
    return None


def _of_parameters(model: nn.Module, plain: nn.Module) -> str | None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = dict(plain.named_parameters(remove_duplicate=False))
    if parameters.keys() != expected.keys():
        return f"the parameters {sorted(parameters.keys() ^ expected.keys())}"
    for name, p in parameters.items():
        alike = p.dtype == expected[name].dtype and p.shape == expected[name].shape
        dense = type(p) is nn.Parameter and p.is_cpu and p.layout == torch.strided
        if not (dense and p.is_contiguous() and alike):
            came = f"{type(p).__name__} {tuple(p.shape)} of {p.dtype}, {p.layout}, on {p.device}"
            return f"the parameter {name}, a {came}"
    return None
