"""fuse(): the numbers, what is looked past and what is not, and torch's tools on fused models."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from channels import channel_errors
from conftest import thinned
from drawn_models import draw, drawn_ids, drawn_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode
from watching import Watch

from gateloop_cpp import (
    CausalFullAttention,
    Decoder,
    GateLoopedAttention,
    SimpleGateLoopLayer,
    Transformer,
    checkpoint,
    fuse,
    unfuse,
)
from gateloop_cpp.fusion import FusedGELU, FusedLinear

SPECS = range(24)
# torch's own tools, of tensors that they read.
READS_GRADIENTS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
MODELS: dict[str, dict[str, Any]] = {
    "gate_loop": dict(depth=2),
    "sigmoid": dict(depth=2, gate="sigmoid", normalize_input=True),
    "post_norm": dict(depth=2, post_ln_norm=True, sub_ln=True, tie_embeddings=True),
    "hybrid": dict(
        depth=3, layers="gate_loop,attention,none", simple_gate_loop=True, dim_head=8, heads=2
    ),
    "wide_heads": dict(depth=2, gate_loop_heads=4),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(name: str = "gate_loop", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = Transformer(16, num_tokens=32, **(MODELS[name] | options)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():  # no norm at its initial values
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def both(model: Any) -> tuple[Any, Any]:
    """The model and its fused copy."""
    return model, fuse(copy.deepcopy(model))


def ids(rows: int = 2, time: int = 13) -> Tensor:
    return torch.randint(32, (rows, time))


def trained(model: Any, *inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    """The loss or output, and all gradients."""
    model.zero_grad()
    y = model(*inputs, **options)
    (y if y.ndim == 0 else y.double().square().mean()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"": y.detach()} | {name: grad.clone() for name, grad in found.items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        try:
            torch.testing.assert_close(ours[name], value, **tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# In float64 two ways to the same number differ by the order of their sums only.
CLOSE: dict[str, Any] = dict(rtol=1e-9, atol=1e-12)


def nodes(y: Tensor) -> list[str]:
    """The names of the autograd functions behind y."""
    seen, left = dict[Any, str](), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            left += [after for after, _ in node.next_functions]
    return list(seen.values())


def fused_norms(model: Any, **options: Any) -> int:
    return sum("ResidualNorm" in name for name in nodes(model(ids(), **options)))


def swish_gates(model: Any, *inputs: Tensor) -> int:
    return sum("SwishGate" in name for name in nodes(model(*inputs)))


# ---- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_a_drawn_model_keeps_its_numbers(spec: int) -> None:
    plain, fused = both(drawn_model(spec).double())
    x = drawn_ids(spec)
    equal(trained(fused, x, return_loss=True), trained(plain, x, return_loss=True), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), **CLOSE)


@pytest.mark.parametrize("spec", SPECS)
def test_a_drawn_model_goes_on_from_the_caches_of_the_plain_one(spec: int) -> None:
    plain, fused = both(drawn_model(spec).double())
    x = drawn_ids(spec)
    with torch.inference_mode():
        whole, (_, cache) = plain(x), plain(x[:, :11], return_cache=True)
        parts = []
        for piece in x[:, 11:].split(7, 1):
            logits, cache = fused(piece, cache=cache, return_cache=True)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole[:, 11:], **CLOSE)


# The floor of relative positions magnifies every rounding.
@pytest.mark.parametrize("spec", [s for s in SPECS if not draw(s)["data_dependent_rel_pos"]])
def test_a_drawn_model_under_autocast_is_as_near_to_float64(spec: int) -> None:
    plain, fused = both(drawn_model(spec))
    x = drawn_ids(spec)
    exact = trained(copy.deepcopy(plain).double(), x, return_loss=True)
    errors = []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16):
            found = trained(model, x, return_loss=True)
        assert found.keys() == exact.keys()
        assert all(grad.dtype == torch.float32 for grad in found.values())
        of_all = sum((found[n].double() - exact[n]).square().sum() for n in exact)
        errors.append(float(torch.as_tensor(of_all)) ** 0.5)
    assert errors[1] <= 1.5 * errors[0]  # two sums of roundings, each of its own


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_low_precision_is_as_near_to_float64(name: str, dtype: torch.dtype) -> None:
    plain, fused = both(make(name, torch.float32).to(dtype))
    x = ids()
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x)
        ours, theirs = (channel_errors(model(x), exact) for model in (fused, plain))
    assert (ours <= 3 * theirs.max()).all()


def test_products_in_float32_that_onednn_takes_where_it_is_faster() -> None:
    """2^20 multiply-adds and more: smaller ones are MKL's everywhere."""
    plain, fused = both(Transformer(64, num_tokens=32, depth=2))
    x = ids(4, 257)
    exact = trained(copy.deepcopy(plain).double(), x, return_loss=True)
    ours, theirs = (trained(model, x, return_loss=True) for model in (fused, plain))
    results = ({f"{n}.grad": t for n, t in of.items()} for of in (ours, exact, theirs))
    parity.check(*results)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: GateLoopedAttention(16),
        lambda: GateLoopedAttention(16, heads=4, sub_ln=True),
        lambda: CausalFullAttention(16, dim_head=8, heads=2, add_swish_gating=True, window=4),
        lambda: SimpleGateLoopLayer(16, post_ln=True),
    ],
)
def test_a_layer_alone(layer: Callable[[], nn.Module]) -> None:
    plain, fused = both(layer().double())
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    equal(trained(fused, x), trained(plain, x), **CLOSE)
    assert swish_gates(plain, x) == 0
    assert swish_gates(fused, x) == (0 if isinstance(plain, SimpleGateLoopLayer) else 1)


@pytest.mark.parametrize("packed", [False, True], ids=["mask", "cu_seqlens"])
def test_ragged_sequences(packed: bool) -> None:
    plain, fused = both(make())
    x = ids(1, 20) if packed else ids(3, 9)
    ragged: dict[str, Tensor] = (
        dict(cu_seqlens=torch.tensor([0, 7, 7, 20]))
        if packed
        else dict(mask=torch.arange(9) < torch.tensor([[9], [4], [7]]))
    )
    equal(
        trained(fused, x, return_loss=True, **ragged),
        trained(plain, x, return_loss=True, **ragged),
        **CLOSE,
    )


# ---- What is looked past -------------------------------------------------------------------------


def test_all_but_the_first_norm_are_fused() -> None:
    for name, norms in (("gate_loop", 4), ("post_norm", 4), ("hybrid", 6)):
        plain, fused = both(make(name))
        assert (fused_norms(plain), fused_norms(fused)) == (0, norms), name


def parts(model: Any) -> list[nn.Module]:
    return [part for block in model.layers for part in block]


Touch = Callable[[Any], object]
TOUCHES: dict[str, Touch] = {
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "a hook on gradients": lambda m: m.register_full_backward_hook(lambda *_: None),
    "a hook before gradients": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "a forward": lambda m: setattr(m, "forward", m.forward),
}


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("where", ["", "norm", "fn", "fn.to_a.0", "fn.to_gates.1"])
def test_a_part_that_is_touched_later_is_called(where: str, touch: str) -> None:
    plain, fused = both(make())
    TOUCHES[touch](fused.layers[1][0].get_submodule(where))
    assert fused_norms(fused) == 2  # its own is called, and adds what the next would have added
    assert swish_gates(fused, ids()) == (1 if "gates" in where else 2)
    x = ids()
    equal(trained(fused, x), trained(plain, x), **CLOSE)


def test_hooks_that_are_removed_leave_it_fused() -> None:
    _, fused = both(make())
    handle = fused.layers[1][0].norm.register_forward_hook(lambda *_: None)
    assert fused_norms(fused) == 2
    handle.remove()
    assert fused_norms(fused) == 4


def test_a_touched_last_norm_is_called() -> None:
    plain, fused = both(make())
    fused.to_logits[0].register_forward_hook(lambda *_: None)
    assert fused_norms(fused) == 3
    x = ids()
    torch.testing.assert_close(fused(x), plain(x), **CLOSE)


def test_a_norm_of_another_epsilon_is_called() -> None:
    plain, fused = both(make("post_norm"))
    for model in (plain, fused):
        model.layers[0][0].norm.eps = 0.5
    assert fused_norms(fused) == 3
    x = ids()
    torch.testing.assert_close(fused(x), plain(x), **CLOSE)


def test_another_activation_is_called() -> None:
    plain, fused = both(make())
    for model in (plain, fused):
        model.layers[0][1].fn[1].approximate = "tanh"
        model.layers[0][0].fn.to_gates[1] = nn.Sigmoid()
    assert swish_gates(fused, ids()) == 1
    x = ids()
    torch.testing.assert_close(fused(x), plain(x), **CLOSE)


def test_a_projection_of_another_class_reads_what_the_norm_gives() -> None:
    """Under autocast a fused norm would pass bfloat16 on, which this class does not expect."""

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x.new_zeros(*x.shape[:-1], 32)

    seen: list[torch.dtype] = []
    _, fused = both(make(dtype=torch.float32))
    fused.layers[1][0].fn.to_a = Wide()
    with torch.autocast("cpu", torch.bfloat16):
        fused(ids())
    assert seen == [torch.float32]


@READS_GRADIENTS
def test_a_compiled_part_is_called() -> None:
    _, fused = both(make())
    fused.layers[1][1].compile(backend="eager")
    assert fused_norms(fused) == 2


def test_hooks_on_all_modules_see_all() -> None:
    plain, fused = both(make("hybrid"))
    seen: list[type[nn.Module]] = []
    x = ids()
    handle = nn.modules.module.register_module_forward_hook(lambda m, _x, _y: seen.append(type(m)))
    try:
        expected = plain(x)
        theirs, seen = [kind.__name__ for kind in seen], []
        torch.testing.assert_close(fused(x), expected, **CLOSE)
    finally:
        handle.remove()
    assert [kind.__name__.removeprefix("Fused") for kind in seen] == theirs


@pytest.mark.parametrize("kind", [nn.Linear, nn.GELU, nn.SiLU, nn.LayerNorm])
def test_a_class_that_is_replaced_for_everyone_is_called(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = both(make("post_norm"))
    x, before = ids(), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, t: 2 * before(self, t))
    torch.testing.assert_close(fused(x), plain(x), **CLOSE)
    monkeypatch.undo()
    assert not torch.allclose(fused(x), plain(x) * 2)
    torch.testing.assert_close(fused(x), plain(x), **CLOSE)


@pytest.mark.parametrize("name", ["linear", "gelu", "silu", "layer_norm"])
def test_a_function_that_is_replaced_for_everyone_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = both(make("post_norm" if name == "layer_norm" else "gate_loop"))
    original, calls = getattr(F, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return original(*args, **options)

    monkeypatch.setattr(F, name, counted)
    plain(ids())
    expected = len(calls)
    fused(ids())
    assert len(calls) == 2 * expected > 0


def test_a_parametrization_is_computed_once() -> None:
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return 2 * weight

    _, fused = both(make())
    counted = Counted()
    parametrize.register_parametrization(fused.layers[0][1].fn[0], "weight", counted, unsafe=True)
    counted.calls = 0
    fused(ids())
    assert counted.calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_of_a_wider_dtype(dtype: torch.dtype) -> None:
    model = make(dtype=torch.bfloat16)
    model.to_logits.to(dtype)
    plain, fused = both(model)
    x = ids()
    y, expected = fused(x), plain(x)
    assert y.dtype == expected.dtype == dtype
    # Two roundings of the stream to 8 bits, in another order.
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)


def test_functions_that_a_mode_replaces_are_called() -> None:
    class Doubling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            y = func(*args, **(kwargs or {}))
            names = ("linear", "gelu", "silu", "layer_norm")
            return 2 * y if getattr(func, "__name__", "") in names else y

    plain, fused = both(make("post_norm"))
    x = ids()
    with Doubling():
        torch.testing.assert_close(fused(x), plain(x), **CLOSE)
    with torch.device("cpu"):  # a mode too, of no consequence
        assert fused_norms(fused) == 4


def test_operators_that_a_mode_counts_are_counted() -> None:
    plain, fused = both(Transformer(64, num_tokens=32, depth=1))
    x = ids(4, 257)
    counts = []
    for model in (plain, fused):
        with FlopCounterMode(display=False) as counter:
            model(x, return_loss=True).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_parameter_of_another_class_is_left_to_itself() -> None:
    plain, fused = both(make())
    for model in (plain, fused):
        to_qkv = model.layers[0][0].fn.to_qkv
        weight = to_qkv.weight.detach()
        to_qkv.weight = nn.Parameter(TwoTensor(weight, 2 * weight))
    x = ids()
    ours, theirs = fused(x), plain(x)
    assert isinstance(ours, TwoTensor)
    torch.testing.assert_close(ours.b, theirs.b, **CLOSE)
    assert not torch.allclose(ours.a, ours.b)


# ---- Which models fuse() takes -------------------------------------------------------------------


class Mine(Transformer):
    pass


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a layer of torch's": (lambda: nn.Linear(2, 2), "the class Linear"),
    "a subclass": (lambda: Mine(8, num_tokens=4, depth=1), "the class Mine"),
    "no module": (lambda: 3, "the class int"),
    "a wrapper": (lambda: nn.Sequential(make()), "the class Sequential"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_other_models_are_refused(which: str) -> None:
    build, named = REFUSED[which]
    with pytest.raises(ValueError, match=rf"fuse: model must be an untouched Transf.*{named}"):
        fuse(build())


ALTERED: dict[str, tuple[Touch, str]] = {
    name: (lambda m, touch=touch: touch(m.layers[1][0].fn.to_out), "at layers.1.0.fn.to_out")
    for name, touch in TOUCHES.items()
} | {
    "a parametrization": (
        lambda m: parametrizations.weight_norm(m.layers[0][1].fn[0]),
        "ParametrizedLinear at layers.0.1.fn.0",
    ),
    "a module": (lambda m: m.to_logits.append(nn.Tanh()), "Tanh at to_logits.2"),
    "a hook on all": (lambda m: m.register_forward_hook(lambda *_: None), "a hook at its top"),
    "a compiled call": (
        lambda m: m.layers[0][1].compile(backend="eager"),
        "a compiled call at layers.0.1",
    ),
}


@pytest.mark.parametrize("which", ALTERED)
def test_a_touched_model_is_refused_and_left_as_it_was(which: str) -> None:
    alter, named = ALTERED[which]
    model = make()
    alter(model)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"fuse: model must be an untouched.*{named}"):
        fuse(model)
    assert [type(module) for module in model.modules()] == before


def test_fusing_is_in_place_and_can_be_undone() -> None:
    model = make("hybrid")
    before = {name: type(module) for name, module in model.named_modules()}
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert fuse(model) is model and fuse(model) is model
    assert isinstance(model, Transformer)
    kinds = {type(module) for module in model.modules()}
    assert {FusedLinear, FusedGELU} <= kinds and not {nn.Linear, nn.GELU} & kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert unfuse(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_what_was_made_of_a_fused_layer_is_not_undone() -> None:
    model = fuse(make())
    parametrizations.weight_norm(model.layers[0][1].fn[0])
    with pytest.raises(ValueError, match=r"unfuse: model must be .* at layers\.0\.1\.fn\.0"):
        unfuse(model)
    assert fused_norms(model) == 2


# ---- Files, copies, decoders ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_copies_are_fused_and_files_the_same(name: str, tmp_path: Path) -> None:
    plain, fused = both(make(name, torch.float32))
    x = ids()
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
        assert torch.equal(twin(x), fused(x))
    for folder, model in (("plain", plain), ("fused", fused)):
        checkpoint.save(model, tmp_path / folder)
    files = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("plain", "fused")]
    assert files[0] == files[1]
    loaded = checkpoint.load(tmp_path / "fused")
    assert type(loaded) is Transformer
    assert torch.equal(loaded(x), plain(x))
    fused.load_state_dict(make(name, torch.float32).state_dict())
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_takes_a_fused_model(name: str) -> None:
    plain, fused = both(make(name, torch.float32))
    x = ids()
    for ours, theirs in zip(Decoder(fused)(x)[:1], Decoder(plain)(x)[:1], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(fused.generate(x, 5, temperature=0), plain.generate(x, 5, temperature=0))
    fused.token_emb.register_forward_hook(lambda *_: None)  # by its modules
    assert torch.equal(fused.generate(x, 5, temperature=0), plain.generate(x, 5, temperature=0))


# ---- torch's tools -------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", ["never", "forward", "backward"])
@pytest.mark.parametrize("name", MODELS)
def test_recomputation(name: str, watched: str) -> None:
    plain, fused = both(make(name, dim_gate_looped_attn=32))
    fused.checkpoint_blocks = True
    x = ids()
    expected = trained(plain, x, return_loss=True)
    fused.zero_grad()
    with Watch() if watched == "forward" else nullcontext():
        loss = fused(x, return_loss=True)
    with Watch() if watched == "backward" else nullcontext():
        loss.backward()
    found = {n: p.grad for n, p in fused.named_parameters() if p.grad is not None}
    equal({"": loss.detach()} | found, expected, **CLOSE)


def test_recomputation_of_large_products_may_be_watched_in_one_pass_only() -> None:
    plain, fused = both(Transformer(64, num_tokens=32, depth=1))
    fused.checkpoint_blocks = True
    x = ids(4, 257)
    with Watch():
        loss = fused(x, return_loss=True)
    loss.backward()
    found = {n: p.grad for n, p in fused.named_parameters()}
    expected = trained(plain, x, return_loss=True)
    equal({"": loss.detach()} | found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", thinned(reversed(MODELS), 2))
def test_compile(name: str) -> None:
    """One graph, by the plain modules: the compiler fuses by itself."""
    torch.compiler.reset()
    plain, fused = both(make(name, torch.float32))
    fused.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for time in (13, 32, 8):
        x = ids(2, time)
        ours, theirs = (trained(m, x, return_loss=True) for m in (fused, plain))
        equal(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_export(name: str) -> None:
    plain, fused = both(make(name, torch.float32).eval())
    time = torch.export.Dim("time", min=2, max=1024)
    program = torch.export.export(fused, (ids(),), dynamic_shapes=({1: time},))
    x = ids(2, 33)
    torch.testing.assert_close(program.module()(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_func_grad_and_functional_call(name: str) -> None:
    plain, fused = both(make(name))
    x = ids()
    weights = {n: p.detach() for n, p in plain.named_parameters()}

    def loss(model: Any) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda w: torch.func.functional_call(model, w, (x,), {"return_loss": True})

    ours, theirs = (torch.func.grad(loss(model))(weights) for model in (fused, plain))
    equal(ours, theirs, **CLOSE)


def test_second_derivatives() -> None:
    found, x = [], ids()
    for model in both(make()):
        leaves = list(model.parameters())
        loss = model(x, return_loss=True)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        norm = torch.stack([g.square().sum() for g in first]).sum()
        found.append(torch.autograd.grad(norm, leaves, allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = fuse(Transformer(16, num_tokens=32, **MODELS[name]))
    assert model(ids().to("meta")).shape == (2, 13, 32)
    plain = make(name, torch.float32)
    model.load_state_dict(plain.state_dict(), assign=True)
    x = ids()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


# ---- The operators -------------------------------------------------------------------------------

ops = torch.ops.gateloop
Operator = Callable[..., Any]
F64 = torch.float64


def layer_norm_of_sum(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x + y, weight.shape, weight, bias)


def rms_norm_of_sum(x: Tensor, y: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return x + y, ops.rms_norm(x + y, gamma)


OPERATORS: dict[str, tuple[Operator, Operator, list[tuple[int, ...]]]] = {
    "linear": (ops.linear, torch.nn.functional.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear without bias": (ops.linear, torch.nn.functional.linear, [(3, 4), (5, 4)]),
    "gelu": (ops.gelu, torch.nn.functional.gelu, [(2, 3, 4)]),
    "swish_gate": (ops.swish_gate, lambda g, x: g * g.sigmoid() * x, [(2, 5), (2, 5)]),
    "add_then_rms_norm": (ops.add_then_rms_norm, rms_norm_of_sum, [(2, 3, 4), (2, 3, 4), (4,)]),
    "add_then_layer_norm": (
        lambda *t: ops.add_then_layer_norm(*t)[0],
        layer_norm_of_sum,
        [(2, 3, 4), (2, 3, 4), (4,), (4,)],
    ),
}
# Of 2^20 multiply-adds: where oneDNN is faster it computes these.
LARGE = [(4, 64, 64), (64, 64), (64,)]


def operands(shapes: list[tuple[int, ...]], dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> Iterator[tuple[Operator, Operator, Any]]:
    yield OPERATORS[request.param]


Case = tuple[Operator, Operator, list[tuple[int, ...]]]


def test_values_are_the_definitions(operator: Case) -> None:
    ours, definition, shapes = operator
    for dtype in (torch.float32, F64):
        of = operands(shapes, dtype)
        torch.testing.assert_close(ours(*of), definition(*of))


def test_derivatives_of_both_orders_and_modes(operator: Case) -> None:
    ours, _, shapes = operator
    of = operands(shapes)
    assert torch.autograd.gradcheck(ours, of, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, of)


def test_gradients_of_one_operand_alone(operator: Case) -> None:
    ours, definition, shapes = operator
    for wanted in range(len(shapes)):
        of = operands(shapes)
        for i, t in enumerate(of):
            t.requires_grad_(i == wanted)
        found = [torch.autograd.grad(sum_of(f(*of)), of[wanted])[0] for f in (ours, definition)]
        torch.testing.assert_close(*found)


def sum_of(results: Any) -> Tensor:
    """With weights: the sum of a norm's rows has no gradient."""
    several = (results,) if isinstance(results, Tensor) else results
    total = torch.zeros((), dtype=several[0].dtype)
    for t in several:
        total = total + (t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum()
    return total


def test_empty_operands_and_any_strides(operator: Case) -> None:
    ours, definition, shapes = operator
    empty = operands([(0, *shape[1:]) if len(shape) > 1 else shape for shape in shapes])
    if "linear" not in str(ours):
        torch.testing.assert_close(ours(*empty), definition(*empty))
    strided = every_second(operands(shapes))
    torch.testing.assert_close(ours(*strided), definition(*strided))


def every_second(of: tuple[Tensor, ...]) -> list[Tensor]:
    """Tensors of the same shapes, whose last dimension has stride 2."""
    return [t.detach().repeat(*[1] * (t.ndim - 1), 2)[..., ::2] for t in of]


@pytest.mark.parametrize("strided", range(len(LARGE)), ids=["x", "weight", "bias"])
def test_large_products_of_any_strides(strided: int) -> None:
    ours, definition, _ = OPERATORS["linear"]
    of = [t.detach() for t in operands(LARGE, torch.float32)]
    of[strided] = every_second(tuple(of))[strided]
    for t in of:
        t.requires_grad_()
    found = []
    for f in (ours, definition):
        y = f(*of)
        found.append((y, *torch.autograd.grad(sum_of(y), of)))
    # Sums of 64 and of 256 products in float32, in another order.
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ["linear", "linear without bias", "gelu", "swish_gate"])
def test_nested_tensors(name: str) -> None:
    """By torch's operators: they have no sizes."""
    ours, definition, shapes = OPERATORS[name]
    if "linear" in name:
        shapes = LARGE[: len(shapes)]
    of: list[Tensor] = [t.detach() for t in operands(shapes, torch.float32)]
    count = 2 if name == "swish_gate" else 1
    nested = [torch.nested.nested_tensor(list(t)) for t in of[:count]]
    for i, our in enumerate(ours(*nested, *of[count:]).unbind()):
        torch.testing.assert_close(our, definition(*(t[i] for t in of[:count]), *of[count:]))


def test_transforms_of_torch_func(operator: Case) -> None:
    ours, definition, shapes = operator
    of = tuple(t.detach() for t in operands(shapes))
    for argnum in range(len(of)):
        found = [
            torch.func.grad(lambda *t, f=f: sum_of(f(*t)), argnum)(*of) for f in (ours, definition)
        ]
        torch.testing.assert_close(*found)
    stacked = tuple(torch.stack((t, 2 * t, -t)) for t in of)
    torch.testing.assert_close(
        torch.func.vmap(ours)(*stacked), torch.func.vmap(definition)(*stacked)
    )
    functional = torch.func.functionalize(ours)(*of)
    torch.testing.assert_close(functional, definition(*of))


def test_a_batch_of_gradients(operator: Case) -> None:
    assert_a_batch_of_gradients(*operator)


def test_a_batch_of_gradients_of_large_products() -> None:
    ours, definition, _ = OPERATORS["linear"]
    assert_a_batch_of_gradients(ours, definition, LARGE)


def assert_a_batch_of_gradients(
    ours: Operator, definition: Operator, shapes: list[tuple[int, ...]]
) -> None:
    of = operands(shapes, torch.float32)
    found = []
    for f in (ours, definition):
        results = f(*of)
        several = (results,) if isinstance(results, Tensor) else results
        torch.manual_seed(1)
        dys = [torch.randn(3, *t.shape) for t in several]
        found.append(torch.autograd.grad(several, of, dys, is_grads_batched=True))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_dual_gradient(operator: Case) -> None:
    """Forward over reverse where the forward pass carried no tangent."""
    ours, definition, shapes = operator
    of = operands(shapes, torch.float32)
    found = []
    for f in (ours, definition):
        with torch.autograd.forward_ad.dual_level():
            y = f(*of)
            y = y if isinstance(y, Tensor) else y[-1]
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 0.5))
            (dx,) = torch.autograd.grad((y * dual).square().sum(), of[0])
            found.append(torch.autograd.forward_ad.unpack_dual(dx).tangent)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


OPCHECKED: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "linear": (ops.linear, [(2, 3, 4), (5, 4), (5,)]),
    "large linear": (ops.linear, LARGE),
    "gelu": (ops.gelu, [(2, 3, 4)]),
    "swish_gate": (ops.swish_gate, [(2, 5), (2, 5)]),
    "add_then_rms_norm": (ops.add_then_rms_norm, [(2, 3, 4), (2, 3, 4), (4,)]),
    "add_then_layer_norm": (ops.add_then_layer_norm, [(2, 3, 4), (2, 3, 4), (4,), (4,)]),
}


@READS_GRADIENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op, shapes = OPCHECKED[name]
    torch.library.opcheck(op.default, operands(shapes, dtype), rtol=1e-2, atol=1e-2)


def test_results_share_no_memory() -> None:
    of = operands(OPCHECKED["add_then_layer_norm"][1], torch.float32)
    assert len(ops.add_then_layer_norm(*of)) == 1
    x, y, weight, bias = of
    with torch.autocast("cpu", torch.bfloat16):
        stream, narrow = ops.add_then_layer_norm(x, y.bfloat16(), weight, bias)
        other, input = ops.add_then_rms_norm(x, y.bfloat16(), weight)
    assert (stream.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert (other.dtype, input.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(narrow, stream.bfloat16())
    assert len({t.data_ptr() for t in (x, stream, narrow, other, input)}) == 5


def test_hooks_may_save_in_another_dtype() -> None:
    for name in ("swish_gate", "add_then_rms_norm", "add_then_layer_norm"):
        ours, definition, shapes = OPERATORS[name]
        of = operands(shapes, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
            y = sum_of(ours(*of))
        (dx,) = torch.autograd.grad(y, of[0])
        (expected,) = torch.autograd.grad(sum_of(definition(*of)), of[0])
        # 8 bits of what was saved, of numbers up to about 4.
        torch.testing.assert_close(dx.float(), expected, rtol=5e-2, atol=5e-2)
