"""Fifty steps of the peer's own training script, reduced to 128 channels: the losses stay together.

tests/golden does the same with the C++ modules.
"""

import copy
from typing import Any

import torch
from parity import peer
from torch import Tensor, nn

from gateloop_cpp import Transformer

STEPS, BATCH, TIME = 50, 2, 32


def losses(model: nn.Module, batches: Tensor) -> Tensor:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curve = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(batch, return_loss=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        curve.append(loss.detach().double())
    return torch.stack(curve)


def test_training_trajectory() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(num_tokens=256, depth=6, gate_loop_heads=128, post_ln_norm=True)
    theirs, ours = peer.Transformer(128, **options), Transformer(128, **options)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    # Each token is the one before it plus a number below 8: there is something to learn.
    batches = torch.randint(8, (STEPS, BATCH, TIME + 1)).cumsum(-1) % 256

    reference, our_curve, their_curve = (losses(m, batches) for m in (exact, ours, theirs))
    assert reference[-5:].mean() < reference[:5].mean() - 0.5
    # Adam divides by small second moments, which magnifies roundings step by step.
    their_error = (their_curve - reference).abs().max()
    assert (our_curve - reference).abs().max() <= 4 * their_error + 1e-6
    torch.testing.assert_close(our_curve, their_curve, rtol=1e-3, atol=0)
