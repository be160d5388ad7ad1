"""Whether a Transformer still is what its options make it."""

from typing import Any
from weakref import WeakKeyDictionary

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
    it. It has no hooks, local or global, and no ``forward`` of an instance. Their classes and
    torch.nn.functional have their own functions. Its parameters are plain, of one dtype and on the
    CPU. It is called outside of autocast and of torch's transforms and modes. Values of parameters,
    ties between them, ``train()`` and ``fuse()`` make no difference.
    """
    if plain_class(type(model)) is not cls:
        return f"the type {type(model).__qualname__}"
    if found := _of_place():
        return found
    try:
        plain = _plain(model, cls)
    except Exception as error:  # of options that were changed
        return f"options of no model: {error}"
    return _of_modules(model, plain) or _of_parameters(model, plain)


# By model: its options in words, and what they make. Each generate() needs it, 5 of its 24 ms for
# one byte of the enwik8 preset.
_PLAIN: WeakKeyDictionary[nn.Module, tuple[str, nn.Module]] = WeakKeyDictionary()


def _plain(model: Any, cls: type[Any]) -> nn.Module:
    words = repr(model.options)
    kept, plain = _PLAIN.get(model, ("", model))
    if kept != words:
        with torch.device("meta"):
            plain = cls(**model.options)
        _PLAIN[model] = (words, plain)
    return plain


def _of_place() -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if torch._C._len_torch_dispatch_stack():
        return "a mode that sees torch's operators"
    return _watchers.of_all_modules()


def _of_modules(model: nn.Module, plain: nn.Module) -> str | None:
    modules, expected = (dict(m.named_modules(remove_duplicate=False)) for m in (model, plain))
    if modules.keys() != expected.keys():
        return f"the modules {sorted(modules.keys() ^ expected.keys())}"
    for name, module in modules.items():
        ours, theirs = vars(module), vars(expected[name])
        kind = plain_class(type(module))
        if kind is not type(expected[name]) or kind not in _watchers.CLASSES:
            return f"{name}, of type {type(module).__qualname__}"
        for key in (ours.keys() | theirs.keys()) - _WITHOUT_EFFECT:
            if key not in ours or key not in theirs or not _equal(ours[key], theirs[key]):
                return f"the attribute {key} of {name or 'the model'}"
    return None


def _equal(a: Any, b: Any) -> bool:
    """Of one type and one value. The == of other types than these need not give a bool."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, int | float | str | set) and a == b


def _of_parameters(model: nn.Module, plain: nn.Module) -> str | None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = next(iter(parameters.values()), None)
    if first is not None and first.is_floating_point():
        plain.to(first.dtype)
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
