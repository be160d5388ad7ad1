"""Models of mixed layers, drawn from all options that there are."""

import random
from typing import Any

import torch
from torch import Tensor

from gateloop_cpp import Transformer

TOKENS, ROWS, STEPS = 17, 2, 29


def draw(seed: int) -> dict[str, Any]:
    r = random.Random(seed)

    def coin() -> bool:
        return r.random() < 0.5

    o: dict[str, Any] = dict(dim=12, num_tokens=TOKENS, depth=r.choice((1, 2, 4)))
    o |= dict(ff_mult=r.choice((1, 2)), heads=r.choice((1, 3)), dim_head=r.choice((2, 4)))
    for flag in ("post_ln_norm", "tie_embeddings", "sub_ln", "rotary_emb"):
        o[flag] = coin()
    for flag in ("attn_add_swish_gating", "data_dependent_rel_pos"):
        o[flag] = coin()
    for flag in ("ablate_complex", "ablate_state_transition"):
        o[flag] = r.random() < 0.25
    o["dim_gate_looped_attn"] = r.choice((None, 24))
    o["gate_loop_heads"] = r.choice((None, 4))
    o["joint_kv"] = o["gate_loop_heads"] is None and coin()
    o["gate"] = r.choice(("polar", "sigmoid", "magnitude_phase"))
    o["normalize_input"] = r.choice((False, True, "variance"))
    if o["gate"] != "polar":
        o["transition_bias"] = r.choice((None, (-1.0, 3.0)))
    if o["gate"] == "magnitude_phase":
        o["phase_bias"] = r.choice((None, (0.0, 3.0)))
    if o["gate_loop_heads"] is not None:
        o["gate_loop_dim_key"] = r.choice((None, 8))
        o["feature_map"] = r.choice(("none", "taylor"))
    o["per_key_transitions"] = o.get("feature_map") != "taylor" and coin()
    o["window"] = r.choice((None, 1, 2, 5, 11, 64))
    o["simple_gate_loop"] = r.choice((None, True, dict(prenorm=coin(), post_ln=coin())))
    mixers = [r.choice(("gate_loop", "attention", "none")) for _ in range(o["depth"])]
    o["layers"] = r.choice((mixers, ",".join(mixers)))
    if isinstance(o["layers"], list) and coin():
        o["layers"][-1] = dict(mixer=mixers[-1], ff_mult=3, simple_gate_loop=None)
    return o


def drawn_model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(**draw(seed))
    with torch.no_grad():
        for weight in model.parameters():  # no norm at its initial values
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def drawn_ids(seed: int) -> Tensor:
    return torch.randint(TOKENS, (ROWS, STEPS), generator=torch.Generator().manual_seed(seed))
