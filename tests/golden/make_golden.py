"""Writes what the reference peer, the installed gateloop-transformer, computes: golden_test.cpp.

    python make_golden.py OUT [--long]

One OUT/CASE.safetensors per case, of LONG or of all others; OUT/stamp last. Metadata: kind, options
(JSON), seed. Tensors:

    weights/NAME     float32, the weights all runs start from
    initial/NAME     the first values the seed alone gives, before any change made here
    input/NAME       token ids, or sequences for the simple layer
    reference/NAME   float64: the peer's result with the weights in float64
    peer/NAME        float32: the same with the weights in float32
"""

import copy
import hashlib
import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from gateloop_transformer import SimpleGateLoopLayer, Transformer
from safetensors.torch import save_file

ADAM_LEARNING_RATE = 1e-4  # as the peer's train.py

SMALL = dict(num_tokens=64, dim=32, depth=2)
ATTENTION = dict(SMALL, use_gate_looped_attn=False, dim_head=8, heads=4)
RELATIVE = dict(ATTENTION, data_dependent_rel_pos=True)
HEADS = dict(SMALL, dim=64, gate_loop_heads=8)

# name: (options, batch, time, time of the Adam steps[, how many of them: 10])
TRANSFORMERS = {
    "train_py": (
        dict(num_tokens=256, dim=512, depth=6, gate_loop_heads=512, post_ln_norm=True),
        2,
        24,
        16,
    ),
    "readme": (dict(num_tokens=256, dim=624, depth=6, use_gate_looped_attn=True), 1, 1024, 16),
    "pre_norm": (SMALL, 2, 37, 37),
    "post_norm": (dict(SMALL, post_ln_norm=True), 2, 37, 37),
    "ablate_complex": (dict(SMALL, ablate_complex=True), 2, 37, 37),
    "ablate_state_transition": (dict(SMALL, ablate_state_transition=True), 2, 37, 37),
    "sub_ln": (dict(SMALL, sub_ln=True), 2, 37, 37),
    "no_swish_gating": (dict(SMALL, attn_add_swish_gating=False), 2, 37, 37),
    "inner_dim": (dict(SMALL, dim_gate_looped_attn=48), 2, 37, 37),
    "inner_dim_no_swish_gating": (
        dict(SMALL, dim_gate_looped_attn=24, attn_add_swish_gating=False),
        2,
        37,
        37,
    ),
    "whole_gradient": (dict(SMALL, frac_gradient_state_transition=1.0), 2, 37, 37),
    "half_gradient": (dict(SMALL, frac_gradient_state_transition=0.5), 2, 37, 37),
    "ff_mult": (dict(SMALL, ff_mult=2), 2, 37, 37),
    "num_tokens": (dict(SMALL, num_tokens=11), 2, 37, 37),
    "heads": (HEADS, 2, 37, 37),
    "heads_kept": (dict(HEADS, checkpoint_gate_looped_attn=False), 2, 37, 37),
    "heads_inner_dim_sub_ln": (dict(HEADS, dim_gate_looped_attn=48, sub_ln=True), 2, 37, 37),
    "heads_ablate_complex": (dict(HEADS, ablate_complex=True), 2, 37, 37),
    "heads_ablate_state_transition": (dict(HEADS, ablate_state_transition=True), 2, 37, 37),
    "attention": (ATTENTION, 2, 37, 37),
    "attention_post_norm": (dict(ATTENTION, post_ln_norm=True), 2, 37, 37),
    "attention_no_swish_gating": (dict(ATTENTION, attn_add_swish_gating=False), 2, 37, 37),
    "attention_no_softmax": (dict(ATTENTION, attn_softmax_normalize=False), 2, 37, 37),
    "attention_rotary": (dict(ATTENTION, rotary_emb=True), 2, 37, 37),
    "relative": (RELATIVE, 2, 37, 37),
    "relative_softmax": (dict(RELATIVE, attn_softmax_normalize=True), 2, 37, 37),
    "relative_rotary": (dict(RELATIVE, rotary_emb=True), 2, 37, 37),
    "relative_ablate_complex": (dict(RELATIVE, ablate_complex=True), 2, 37, 37),
    "relative_ablate_state_transition": (dict(RELATIVE, ablate_state_transition=True), 2, 37, 37),
    "relative_quarter_gradient": (dict(RELATIVE, frac_gradient_state_transition=0.25), 2, 37, 37),
    # Any phase, as drawn: the real part goes negative and onto its floor of 1e-10, and dividing by
    # that multiplies errors by 1e10. One layer, because a second one would compound them.
    "relative_floor": (dict(RELATIVE, depth=1), 2, 37, 37),
    # A training trajectory: the model of the peer's train.py, reduced to 128 channels.
    "train_py_narrow": (
        dict(num_tokens=256, dim=128, depth=6, gate_loop_heads=128, post_ln_norm=True),
        2,
        24,
        32,
        50,
    ),
    "readme_narrow": (
        dict(num_tokens=256, dim=104, depth=6, use_gate_looped_attn=True),
        1,
        1024,
        16,
    ),
}

# Models of 20 and 28 million weights; "train_py_narrow" and "readme_narrow" have their other
# options.
LONG = ("train_py", "readme")

# name: options
SIMPLE_LAYERS = {
    "simple": dict(),
    "simple_no_prenorm": dict(prenorm=False),
    "simple_post_ln": dict(post_ln=True),
    "simple_reverse": dict(reverse=True, post_ln=True),
}


def move_off_initial_values(model):
    """Norms start as ones and zeros, which would hide a missing factor or term."""
    for name, parameter in model.named_parameters():
        if name.endswith("gamma") or "norm" in name or "_ln." in name:
            parameter.add_(0.2 * torch.randn_like(parameter))


def keep_phases_small(model):
    """Transitions near the positive real axis, where relative positions are well conditioned."""
    for name, parameter in model.named_parameters():
        if name == "token_emb.weight":
            parameter.mul_(0.3).add_(1.0)
        elif name.endswith("to_a.0.weight"):
            parameter[0::2].abs_()
            parameter[1::2].mul_(0.3)


def gradients(model):
    return {f"grad/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run_transformer(model, inputs):
    ids = inputs["ids"]
    logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    result = {"logits": logits.detach(), "loss": loss.detach().reshape(1)} | gradients(model)

    optimizer = torch.optim.Adam(model.parameters(), lr=ADAM_LEARNING_RATE)
    losses = []
    for batch in inputs["adam"]:
        optimizer.zero_grad()
        loss = model(batch, return_loss=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return result | {"adam_losses": torch.stack(losses)}


def run_simple_layer(layer, inputs):
    dtype = next(layer.parameters()).dtype
    x, dy, more = (inputs[name].to(dtype) for name in ("x", "dy", "more"))
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    result = {"y": y.detach(), "grad/x": x.grad} | gradients(layer)
    if layer.reverse:
        return result
    with torch.no_grad():
        cache = None
        for part, sequence in (("first", x), ("second", more), ("third", more[:, :1])):
            y, cache = layer(sequence, cache=cache, return_cache=True)
            result |= {f"{part}/y": y, f"{part}/a": cache[0], f"{part}/kv": cache[1]}
    return result


def build_transformer(options, batch, time, adam_time, adam_steps=10):
    model = Transformer(**options)
    initial = {n: p.detach().flatten()[:16].clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        move_off_initial_values(model)
        if options.get("data_dependent_rel_pos") and options["depth"] > 1:
            keep_phases_small(model)
    tokens = options["num_tokens"]
    inputs = {
        "ids": torch.randint(tokens, (batch, time + 1)),
        "adam": torch.randint(tokens, (adam_steps, batch, adam_time + 1)),
    }
    return model, initial, inputs


def build_simple_layer(options):
    batch, time, dim = 3, 21, 40
    layer = SimpleGateLoopLayer(dim, **options)
    initial = {n: p.detach().flatten()[:16].clone() for n, p in layer.named_parameters()}
    with torch.no_grad():
        move_off_initial_values(layer)
    inputs = {
        "x": torch.randn(batch, time, dim),
        "dy": torch.randn(batch, time, dim),
        "more": torch.randn(batch, 5, dim),
    }
    return layer, initial, inputs


def write_case(out, name, kind, options, seed, build, run):
    torch.manual_seed(seed)
    model, initial, inputs = build()
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    # A copy made before the first run: the peer caches rotary angles in the precision of that run.
    in_double = copy.deepcopy(model).double()
    single, double = run(model, inputs), run(in_double, inputs)

    tensors = {}
    for prefix, group in (
        ("weights", weights),
        ("initial", initial),
        ("input", inputs),
        ("reference", double),
        ("peer", single),
    ):
        tensors |= {f"{prefix}/{n}": t.contiguous().clone() for n, t in group.items()}
    metadata = dict(
        kind=kind,
        options=json.dumps(options),
        seed=str(seed),
        learning_rate=str(ADAM_LEARNING_RATE),
    )
    save_file(tensors, out / f"{name}.safetensors", metadata)


def main():
    out, long = Path(sys.argv[1]), sys.argv[2:] == ["--long"]
    out.mkdir(parents=True, exist_ok=True)
    stamp = hashlib.sha256(Path(__file__).read_bytes()).hexdigest() + "".join(
        f" {p}=={version(p)}" for p in ("gateloop-transformer", "rotary-embedding-torch", "torch")
    )
    stamp_file = out / "stamp"
    if stamp_file.exists() and stamp_file.read_text(encoding="utf-8") == stamp:
        return
    stamp_file.unlink(missing_ok=True)
    for old in out.glob("*.safetensors"):
        old.unlink()
    for seed, (name, (options, *sizes)) in enumerate(TRANSFORMERS.items()):
        if (name in LONG) == long:
            build = partial(build_transformer, options, *sizes)
            write_case(out, name, "transformer", options, seed, build, run_transformer)
    for seed, (name, options) in enumerate(() if long else SIMPLE_LAYERS.items(), start=100):
        build = partial(build_simple_layer, options)
        write_case(out, name, "simple_gate_loop_layer", options, seed, build, run_simple_layer)
    stamp_file.write_text(stamp, encoding="utf-8")


if __name__ == "__main__":
    main()
