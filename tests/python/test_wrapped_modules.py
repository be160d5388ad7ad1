"""A module's result is what calling its submodules gives, whatever was done to them.

Of plain models, and of those that were fused before.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn_models import drawn_model
from parity import peer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing._internal.two_tensor import TwoTensor

import gateloop_cpp
from gateloop_cpp import Decoder, SimpleGateLoopLayer, Transformer, fuse

SIMPLE: dict[str, Any] = dict(dim=16, post_ln=True)
MODELS: dict[str, dict[str, Any]] = {
    "gate_loop": dict(dim=16, num_tokens=32, depth=2),
    "wide_heads": dict(dim=16, num_tokens=32, depth=1, gate_loop_heads=4, sub_ln=True),
    "post_norm": dict(dim=16, num_tokens=32, depth=1, post_ln_norm=True, sub_ln=True),
    "attention": dict(
        dim=16, num_tokens=32, depth=1, use_gate_looped_attn=False, dim_head=8, heads=2
    ),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(package: Any, name: str, fused: bool = False) -> nn.Module:
    """float64, in which two orders of summation agree to about twelve digits."""
    made: nn.Module = (
        package.SimpleGateLoopLayer(**SIMPLE)
        if name == "simple"
        else package.Transformer(**MODELS[name])
    )
    return fuse(made).double() if fused else made.double()


def given(name: str, time: int = 12) -> Tensor:
    if name == "simple":
        return torch.randn(2, time, 16, dtype=torch.float64)
    return torch.randint(32, (2, time))


# ---- Every use of a model, each with its result --------------------------------------------------


def run_training(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    y.double().square().mean().backward()
    return y.detach()


@torch.no_grad()
def run_inference(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


@torch.no_grad()
def run_stepwise(model: Any, x: Tensor) -> Tensor:
    """One sequence, token by token."""
    pieces, cache = [], None
    for piece in x[:1].split(1, dim=1):
        y, cache = model(piece, cache=cache, return_cache=True)
        pieces.append(y)
    return torch.cat(pieces, dim=1)


def run_generation(sequences: int) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, x: Tensor) -> Tensor:
        tokens: Tensor = model.generate(x[:sequences], 8, temperature=0)
        return tokens

    return run


USES = {
    "training": run_training,
    "inference": run_inference,
    "stepwise": run_stepwise,
    "generation": run_generation(1),
    "generation together": run_generation(2),
}


def uses(name: str) -> list[str]:
    return [use for use in USES if name != "simple" or "generation" not in use]


CASES = [(name, use) for name in ("simple", *MODELS) for use in uses(name)]
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])

# ---- Hooks ---------------------------------------------------------------------------------------


def calls(model: nn.Module, run: Callable[[], object]) -> Counter[str]:
    """How often a hook on each module fires."""
    seen: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.update([name]))
        for name, module in model.named_modules()
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


@FUSED
@pytest.mark.parametrize(("name", "use"), CASES)
def test_hooks_fire_on_every_module(name: str, use: str, fused: bool) -> None:
    model, x = make(gateloop_cpp, name, fused), given(name)
    seen = calls(model, lambda: USES[use](model, x))
    called = {n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    assert seen.keys() == called
    # Once a pass: a pass of the prompt and one of each token but the last, or one of each step.
    passes = {"training": 1, "inference": 1, "stepwise": x.shape[1]}.get(use, 8)
    assert set(seen.values()) == {passes}


@FUSED
@pytest.mark.parametrize("name", ["simple", *MODELS])
def test_a_hook_changes_what_it_changes_in_the_peer(name: str, fused: bool) -> None:
    """Each output doubled in turn, in both: layouts differ, doubling acts on each number alone."""
    theirs, ours = make(peer, name), make(gateloop_cpp, name, fused)
    ours.load_state_dict(theirs.state_dict())
    x = given(name)
    common = dict(theirs.named_modules()).keys() & dict(ours.named_modules()).keys()
    plain = run_inference(ours, x)
    without_effect = set()
    for module in sorted(common):
        results = []
        for model in (theirs, ours):
            target = model.get_submodule(module)
            handle = target.register_forward_hook(lambda _m, _x, y: 2 * y)
            results.append(run_inference(model, x))
            handle.remove()
        # float64: what differs is the order of sums.
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11, msg=module)
        if torch.equal(results[1], plain):
            without_effect.add(module)
    # A list is never called; the last norm takes a factor out of the last feed-forward's block.
    lists = {m for m in common if isinstance(ours.get_submodule(m), nn.ModuleList)}
    assert without_effect - {f"layers.{MODELS.get(name, SIMPLE).get('depth', 0) - 1}.1"} <= lists


@FUSED
@pytest.mark.parametrize("use", ["stepwise", "generation", "generation together"])
def test_hooks_on_all_modules_fire(use: str, fused: bool) -> None:
    model, x = make(gateloop_cpp, "gate_loop", fused), given("gate_loop")
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, _x, _y: seen.append(m))
    try:
        USES[use](model, x)
    finally:
        handle.remove()
    assert sum(m is model.get_submodule("token_emb") for m in seen) >= 8


def replace(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[int]:
    """A number is added to the list at each call of the function."""
    before, seen = getattr(place, name), list[int]()

    def counted(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        return before(*arguments, **options)

    monkeypatch.setattr(place, name, counted)
    return seen


def classes_of_models() -> dict[type[nn.Module], dict[str, Any]]:
    """Every class whose modules are called in some model, with the options of such a model."""
    drawn = [drawn_model(seed).options for seed in range(8)]
    return {
        kind: options
        for options in (*drawn, *MODELS.values())
        for kind in map(type, Transformer(**options).modules())
        if kind is not nn.ModuleList
    }


CLASSES = classes_of_models()


@FUSED
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_a_class_replaced_for_everyone_is_called(
    name: str, kind: Any, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(**CLASSES[kind])
    if fused:
        fuse(model)
    x = torch.zeros(1, 2, dtype=torch.int64)
    expected = model.generate(x, 3, temperature=0)
    seen = replace(monkeypatch, kind, name)
    assert torch.equal(model.generate(x, 3, temperature=0), expected)
    assert len(seen) >= 3 * sum(isinstance(m, kind) for m in model.modules())


@FUSED
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (nn.Module, "_call_impl"),
        (F, "embedding"),
        (F, "linear"),
        (F, "scaled_dot_product_attention"),
    ],
)
def test_a_function_replaced_for_everyone_is_called(
    place: Any, name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make(gateloop_cpp, "attention", fused).float()
    seen = replace(monkeypatch, place, name)
    model.generate(given("attention")[:1], 3, temperature=0)
    assert len(seen) >= 3


def test_modules_of_a_class_in_place_of_torchs_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    monkeypatch.setattr(nn, "Linear", Mine)
    model = Transformer(**MODELS["gate_loop"])
    with pytest.raises(ValueError, match=r"of type .*Mine"):
        Decoder(model)


# ---- Adapters, offloading, parametrisations, layers of other kinds -------------------------------


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def add_adapters(model: nn.Module) -> nn.Module:
    """Low-rank updates by replacing ``forward`` of instances; returns the merged model."""
    merged = copy.deepcopy(model)
    for name, layer in linears(model).items():
        down = torch.randn(2, layer.in_features, dtype=torch.float64)
        up = torch.randn(layer.out_features, 2, dtype=torch.float64) / 8
        plain = layer.forward

        def forward(x: Tensor, plain: Any = plain, down: Tensor = down, up: Tensor = up) -> Tensor:
            y: Tensor = plain(x) + x @ down.t() @ up.t()
            return y

        setattr(layer, "forward", forward)  # noqa: B010
        with torch.no_grad():
            merged.get_parameter(name + ".weight").add_(up @ down)
    return merged


def offload(model: nn.Module) -> nn.Module:
    """Parameters of leaf modules are on ``meta`` but for the time of their calls."""
    whole = copy.deepcopy(model)
    for module in list(model.modules()):
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        away = {n: nn.Parameter(p.to("meta"), requires_grad=False) for n, p in own.items()}

        def forward(
            *args: Any,
            module: Any = module,
            plain: Any = module.forward,
            own: Any = own,
            away: Any = away,
            **options: Any,
        ) -> Any:
            module._parameters.update(own)
            try:
                return plain(*args, **options)
            finally:
                module._parameters.update(away)

        module._parameters.update(away)
        module.forward = forward
    return whole


def add_weight_norm(model: nn.Module) -> nn.Module:
    merged = copy.deepcopy(model)
    for name, layer in linears(model).items():
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.get_parameter("parametrizations.weight.original0").mul_(1.5)
            merged.get_parameter(name + ".weight").mul_(1.5)
    return merged


class Int8Linear(nn.Module):
    """Has neither ``weight`` nor ``in_features``, as layers of quantisation packages."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("levels", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.offset = layer.bias

    def dense(self) -> Tensor:
        return self.get_buffer("levels") * self.get_buffer("scale")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.offset)


def quantise(model: nn.Module) -> nn.Module:
    dequantised = copy.deepcopy(model)
    for name, layer in linears(model).items():
        parent, _, child = name.rpartition(".")
        small = Int8Linear(layer)
        setattr(model.get_submodule(parent), child, small)
        with torch.no_grad():
            dequantised.get_parameter(name + ".weight").copy_(small.dense())
    return dequantised


CHANGES = {
    "adapters": add_adapters,
    "offloading": offload,
    "a parametrization": add_weight_norm,
    "quantised layers": quantise,
}


@FUSED
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "use"), CASES)
def test_changed_layers_count_in_every_use(name: str, use: str, change: str, fused: bool) -> None:
    model, x = make(gateloop_cpp, name, fused), given(name)
    if change == "offloading" and use == "training":
        model.requires_grad_(False)
        x = x.requires_grad_() if x.is_floating_point() else x
    before = USES["inference"](model, x)
    plain = CHANGES[change](model)
    if change != "offloading":  # which changes no number
        assert not torch.equal(USES["inference"](plain, x), before)
    run = USES["inference"] if change == "offloading" and use == "training" else USES[use]
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("use", ["inference", "training"])
def test_an_adapter_counts_in_long_sequences(use: str) -> None:
    model = SimpleGateLoopLayer(8).double()
    merged = add_adapters(model)
    x = torch.randn(1, 5000, 8, dtype=torch.float64)
    torch.testing.assert_close(USES[use](model, x), USES[use](merged, x), rtol=1e-9, atol=1e-11)


def test_a_parameter_of_another_class_is_left_to_itself() -> None:
    layer: Any = SimpleGateLoopLayer(8)
    weight = layer.to_qkva[0].weight.detach()
    layer.to_qkva[0].weight = nn.Parameter(TwoTensor(weight, 2 * weight))
    doubled = copy.deepcopy(layer)
    doubled.to_qkva[0].weight = nn.Parameter(2 * weight)
    for time in (1, 5, 3000):
        x = torch.randn(1, time, 8)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = layer(x)
            assert isinstance(y, TwoTensor)
            torch.testing.assert_close(y.b, doubled(x))


@FUSED
def test_a_gate_in_float32_beside_bfloat16(fused: bool) -> None:
    model = Transformer(16, num_tokens=32, depth=1).bfloat16()
    if fused:
        fuse(model)
    to_a: Any = model.get_submodule("layers.0.0.fn.to_a").float()
    plain = to_a.forward
    to_a.forward = lambda x: plain(x.float())
    assert model(given("gate_loop")).isfinite().all()


# ---- Which models a Decoder may read -------------------------------------------------------------


def quantise_embedding(model: Any) -> None:
    """Its ``weight`` is a function."""
    model.token_emb.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    with warnings.catch_warnings(action="ignore"):  # deprecated, and still in use
        model.token_emb = torch.ao.nn.quantized.Embedding.from_float(model.token_emb)


@pytest.mark.parametrize(
    "change", [quantise_embedding, lambda m: setattr(m, "token_emb", nn.Sequential(m.token_emb))]
)
def test_an_embedding_of_another_class_is_called(change: Callable[[Any], object]) -> None:
    model = Transformer(**MODELS["gate_loop"])
    change(model)
    text = given("gate_loop")[:1]
    drawn = model.generate(text, 5, temperature=0)
    for _ in range(5):
        text = torch.cat((text, model(text)[:, -1:].argmax(-1)), 1)
    assert torch.equal(text[:, -5:], drawn)
    with pytest.raises(IndexError, match=r"x must be in \[0, 32\), got 32"):
        model(torch.tensor([[32]]))


def layer_of(model: Any, index: int = 0) -> tuple[Any, Any]:
    mix, feed = model.layers[index]
    return mix.fn, feed.fn


def hook(model: Any) -> None:
    model.token_emb.register_forward_hook(lambda *_: None)


def two_tensors(model: Any) -> None:
    weight = model.token_emb.weight.detach()
    model.token_emb.weight = nn.Parameter(TwoTensor(weight, weight.clone()))


def change_options(model: Any) -> None:
    model.options["wings"] = 2


def add_attribute(model: Any) -> None:
    layer_of(model)[1][0]._hf_hook = object()


TOUCHED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hook": (hook, "token_emb"),
    "a hook before": (
        lambda m: m.layers[0][0].register_forward_pre_hook(lambda *_: None),
        r"layers.0.0",
    ),
    "a hook on gradients": (
        lambda m: m.layers[0][0].register_full_backward_hook(lambda *_: None),
        r"layers.0.0",
    ),
    "a forward": (
        lambda m: setattr(layer_of(m)[0].to_qkv, "forward", lambda x: x),
        "to_qkv",
    ),
    "a parametrization": (lambda m: parametrizations.weight_norm(m.token_emb), "modules"),
    "a type": (
        lambda m: layer_of(m)[1].__setitem__(0, Int8Linear(layer_of(m)[1][0])),
        "Int8Linear",
    ),
    "another activation": (lambda m: layer_of(m)[1].__setitem__(1, nn.GELU("tanh")), "approximate"),
    "another ablation": (lambda m: setattr(m, "ablate_complex", True), "ablate_complex"),
    "an attribute": (add_attribute, "_hf_hook"),
    "tensors": (lambda m: setattr(m, "depths", torch.ones(3)), "depths"),
    "numbers of an array": (
        lambda m: setattr(m, "ablate_complex", np.zeros(3)),
        "ablate_complex",
    ),
    "several tensors": (
        lambda m: setattr(layer_of(m)[0], "state_shape", (torch.ones(3),)),
        "state_shape",
    ),
    "other options": (change_options, "wings"),
    "an embedding in another module": (
        lambda m: setattr(m, "token_emb", nn.Sequential(m.token_emb)),
        "token_emb",
    ),
    "no parameters": (lambda m: setattr(m, "token_emb", nn.Identity()), "token_emb"),
    "a quantised embedding": (quantise_embedding, "token_emb"),
    "a compiled layer": (lambda m: layer_of(m)[1].compile(), "_compiled_call_impl"),
    "another bias": (
        lambda m: setattr(layer_of(m)[0], "to_qkv", nn.Linear(16, 48)),
        "to_qkv.bias",
    ),
    "mixed dtypes": (lambda m: m.token_emb.double(), "the parameter"),
    "another device": (lambda m: m.to_logits.to("meta"), "meta"),
    "a class of parameters": (two_tensors, "TwoTensor"),
    "a layer less": (lambda m: m.layers.__delitem__(1), "modules"),
}


@FUSED
@pytest.mark.parametrize("which", TOUCHED)
def test_a_decoder_refuses_a_touched_model(which: str, fused: bool) -> None:
    change, named = TOUCHED[which]
    model = Transformer(**MODELS["gate_loop"])
    if fused:
        fuse(model)
    Decoder(model)
    change(model)
    with pytest.raises(ValueError, match=rf"Decoder: model must be an untouched.*{named}"):
        Decoder(model)


@contextmanager
def in_a_function_mode() -> Iterator[None]:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


@contextmanager
def in_a_dispatch_mode() -> Iterator[None]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        yield


@FUSED
@pytest.mark.parametrize(
    "place",
    [lambda: torch.autocast("cpu", torch.bfloat16), in_a_function_mode, in_a_dispatch_mode],
)
def test_modules_are_called_where_others_watch(place: Callable[[], Any], fused: bool) -> None:
    model = Transformer(**MODELS["gate_loop"])
    if fused:
        fuse(model)
    with place(), pytest.raises(ValueError, match="untouched"):
        Decoder(model)
    with place():
        assert model.generate(given("gate_loop")[:1], 3).shape == (1, 3)


def test_a_default_device_is_no_mode() -> None:
    with torch.device("cpu"):
        Decoder(Transformer(**MODELS["gate_loop"]))


def test_a_subclass_is_called() -> None:
    class Mine(Transformer):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            seen.append(1)
            return super().forward(*arguments, **options)

    seen: list[int] = []
    Mine(**MODELS["gate_loop"]).generate(torch.zeros(1, 1, dtype=torch.int64), 4)
    assert len(seen) == 4


def test_training_mode_loading_hooks_and_ties_are_no_difference() -> None:
    model: Any = Transformer(**MODELS["gate_loop"]).eval()
    model.checkpoint_blocks = True
    model.to_logits[1].weight = model.token_emb.weight
    model.register_state_dict_pre_hook(lambda *_: None)
    layer_of(model, 1)[0].to_gates = layer_of(model)[0].to_gates
    Decoder(model)


def test_a_parametrization_is_left_in_place() -> None:
    model = Transformer(**MODELS["gate_loop"])
    parametrizations.weight_norm(model.token_emb)
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 2)
    assert parametrize.is_parametrized(model.token_emb)
