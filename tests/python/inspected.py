"""What a page of gateloop_cpp.inspection shows, by its slow definition in double precision."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gateloop_cpp import CausalFullAttention, GateLoopedAttention, SimpleGateLoopLayer, Transformer
from gateloop_cpp.inspection.influence import WINDOW

Array = npt.NDArray[Any]

TEXT = (
    b"The cat sat on the mat.\nThe dog sat on the log; caf\xc3\xa9 \xe2\x82\xac \xff\x00\n" * 8
)[:390]

#: Options of Transformer by what they try.
MODELS: dict[str, dict[str, Any]] = {
    "polar": dict(),
    "polar, normalised": dict(normalize_input=True, sub_ln=True),
    "magnitude and phase": dict(gate="magnitude_phase", transition_bias=(-2.0, 4.0)),
    "sigmoid, joint": dict(gate="sigmoid", joint_kv=True, normalize_input="variance"),
    "sigmoid": dict(gate="sigmoid", normalize_input=True, transition_bias=(-8.0, 6.0)),
    "wide": dict(gate_loop_heads=3, gate_loop_dim_key=6, normalize_input=True),
    "wide, real": dict(gate_loop_heads=2, gate="sigmoid", transition_bias=(0.0, 5.0)),
    "without imaginary part": dict(ablate_complex=True),
    "without decay": dict(ablate_state_transition=True),
    "hybrid": dict(
        layers="gate_loop,attention,none", depth=3, window=20, rotary_emb=True, heads=2, dim_head=4,
        simple_gate_loop=True,
    ),
}  # fmt: skip


def small_model(**options: Any) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(**(dict(num_tokens=256, dim=12, depth=1) | options))
    with torch.no_grad():
        for parameter in model.parameters():  # gates far from their start
            if parameter.requires_grad:
                parameter.mul_(2)
    return model.eval()


@dataclass
class Definition:
    """Of one mixer, all in loops over steps."""

    query: Array  # (T, H, K), max heads as heads of one channel
    key: Array  # (T, H, K)
    value: Array  # (T, H, V)
    a: Array | None  # (T, H); None of attention
    read_out: Array | None  # (T, H, V): what the module computed

    def weight(self, t: int, s: int) -> Array:
        """w(t, s) of each head, (H)."""
        assert self.a is not None
        product = np.ones(self.a.shape[1], complex)
        for r in range(s + 1, t + 1):
            product = product * self.a[r]
        return cast(Array, (self.query[t] * self.key[s]).sum(-1) * product.real)

    def sizes(self, t: int) -> Array:
        """(H, steps of the window before and at t): the length of each contribution."""
        assert self.a is not None
        first = max(0, t - WINDOW + 1)
        product = np.ones(self.a.shape[1], complex)
        sizes = []
        for s in range(t, first - 1, -1):
            w = (self.query[t] * self.key[s]).sum(-1) * product.real
            sizes.append(np.abs(w) * np.sqrt((self.value[s] ** 2).sum(-1)))
            product = product * self.a[s]
        return np.stack(sizes[::-1], 1)

    def shares(self, t: int) -> Array:
        """Of all heads together, in the window."""
        sizes = np.sqrt((self.sizes(t) ** 2).sum(0))
        return cast(Array, sizes / sizes.sum())

    def half_lives(self) -> Array:
        assert self.a is not None
        with np.errstate(divide="ignore"):
            return np.log(2) / np.abs(np.log(np.abs(self.a)))

    def forgotten(self) -> Array:
        assert self.a is not None
        state = np.zeros((*self.key.shape[1:], self.value.shape[2]), complex)
        shares = []
        for t in range(len(self.a)):
            total = (np.abs(state) ** 2).sum()
            state = state * self.a[t][:, None, None]
            shares.append(1 - (np.abs(state) ** 2).sum() / total if total > 0 else 0.0)
            state = state + self.key[t][:, :, None] * self.value[t][:, None, :]
        return np.array(shares)


def definitions(model: Transformer, text: bytes) -> list[Definition]:
    """Of the mixers in the order of the page, of a copy of the model in double precision."""
    double = small_copy(model).double()
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    modules: list[nn.Module] = []
    for block in double.layers:
        mix, _, *simple = cast(nn.ModuleList, block)
        modules += simple
        modules += [] if isinstance(mix, nn.Identity) else [cast(nn.Module, mix.fn)]
    for module in modules:
        module.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0]))
        if isinstance(module, GateLoopedAttention):
            module.maybe_sub_ln.register_forward_pre_hook(
                lambda m, args: outputs.__setitem__(m, args[0])
            )
    with torch.no_grad():
        double(torch.tensor([list(text)]))
        found = []
        for module in modules:
            x = inputs[module]
            if isinstance(module, SimpleGateLoopLayer):
                found.append(_of_simple(module, x))
            elif isinstance(module, GateLoopedAttention):
                found.append(_of_gate_loop(module, x, outputs[module.maybe_sub_ln], model.options))
            elif isinstance(module, CausalFullAttention):
                found.append(_of_attention(module, x))
    return found


def small_copy(model: Transformer) -> Transformer:
    copy = Transformer(**model.options)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def _sigmoid(x: Array) -> Array:
    return cast(Array, 1 / (1 + np.exp(-x)))


def _of_simple(module: SimpleGateLoopLayer, x: Tensor) -> Definition:
    q, kv, z = (t[0].numpy()[:, :, None] for t in module.to_qkva(module.norm(x)).chunk(3, -1))
    return Definition(q, kv, np.ones_like(kv), _sigmoid(z[:, :, 0]), None)


def _of_gate_loop(
    module: GateLoopedAttention, x: Tensor, y: Tensor, options: dict[str, Any]
) -> Definition:
    heads = module.heads
    qkv = module.to_qkv(x)[0].numpy()
    if module.joint_kv:
        q, k = np.split(qkv, 2, axis=1)
        v = np.ones_like(k)
    else:
        q, k, v = np.split(qkv, [module.dim_key, 2 * module.dim_key], axis=1)
    q, k, v = (t.reshape(len(t), heads, -1) for t in (q, k, v))
    z = module.to_a(x)[0].numpy()
    pairs = z.reshape(len(z), heads, -1)
    if module.gate == "sigmoid":
        a: Array = _sigmoid(z)
    else:
        first, second = pairs[..., 0], pairs[..., 1] * (not options["ablate_complex"])
        raw = first + 1j * second
        polar = _sigmoid(np.abs(raw)) * raw / np.abs(raw)
        a = polar if module.gate == "polar" else _sigmoid(first) * np.exp(1j * second)
    rest = 1 - np.abs(a)
    scale = {"none": 1 + 0 * rest, "mean": rest, "variance": np.sqrt(1 - np.abs(a) ** 2)}
    if options["ablate_state_transition"]:
        a, scale = np.ones_like(a), {module.normalize_input: np.ones_like(rest)}
    k = k * scale[module.normalize_input][:, :, None]
    return Definition(q, k, v, a, y[0].numpy().reshape(v.shape))


class _Attention(Definition):
    window: int

    def sizes(self, t: int) -> Array:
        first = max(0, t - WINDOW + 1)
        sizes = np.zeros((self.query.shape[1], t - first + 1))
        seen = range(max(0, t - self.window + 1), t + 1)
        scores = np.stack([(self.query[t] * self.key[s]).sum(-1) for s in seen], 1)
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        lengths = np.stack([np.sqrt((self.value[s] ** 2).sum(-1)) for s in seen], 1)
        sizes[:, -len(seen) :] = weights * lengths
        return sizes


def _of_attention(module: CausalFullAttention, x: Tensor) -> Definition:
    q, k, v = module.to_qkv(x).permute(2, 0, 3, 1, 4)
    if module.rotary_emb is not None:
        q, k = module.rotary_emb(q), module.rotary_emb(k)
    q, k, v = (t[0].transpose(0, 1).numpy() for t in (q * module.scale, k, v))
    found = _Attention(q, k, v, None, None)
    found.window = cast(int, module.window)
    return found
