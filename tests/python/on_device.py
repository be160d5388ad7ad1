"""What a device gives beside the CPU; run by test_devices.py in a process of its own.

GATELOOP_TEST_DEVICE names it. "fake" (tests/cpp/ops/fake_device.cpp) is one without code in the
library; a process has one such device for good.
"""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from channels import assert_near
from conftest import BUILD
from drawn_models import drawn_ids, drawn_model
from test_gate_loop import drawn
from test_ops import CASES, Case, call, inputs
from torch import Tensor
from torch.utils.backend_registration import rename_privateuse1_backend

from gateloop_cpp import SimpleGateLoopLayer, Transformer, checkpoint, fuse
from gateloop_cpp.ops import gate_loop


class Backend:
    """What torch.fake is."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """It draws from the CPU's generator."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


DEVICE = os.environ["GATELOOP_TEST_DEVICE"]
if DEVICE == "fake":
    rename_privateuse1_backend("fake")
    torch._register_device_module("fake", Backend)
    torch.ops.load_library(str(BUILD / "lib" / "libgateloop_fake_device.so"))

Ops = Any  # torch.ops.gateloop
F64, C128 = torch.float64, torch.complex128
Function = Callable[..., tuple[Tensor, Tensor]]


def results(function: Function, arguments: tuple[Tensor, ...], device: str) -> tuple[Tensor, ...]:
    """Outputs, gradients, and derivatives of these."""
    leaves = [t.detach().to(device).requires_grad_() for t in arguments]
    outputs = function(*leaves)
    total = torch.stack([output.abs().square().sum() for output in outputs]).sum()
    once = torch.autograd.grad(total, leaves, create_graph=True)
    squares = torch.stack([gradient.abs().square().sum() for gradient in once]).sum()
    found = (*outputs, *once, *torch.autograd.grad(squares, leaves))
    assert all(t.device.type == device for t in found)
    return tuple(t.detach().cpu() for t in found)


def assert_alike(function: Function, arguments: tuple[Tensor, ...]) -> None:
    there, here = (results(function, arguments, device) for device in (DEVICE, "cpu"))
    for ours, theirs in zip(there, here, strict=True):
        assert ours.dtype == theirs.dtype
        assert_near(ours, theirs, 1e-10)


@pytest.mark.parametrize("how", ["plain", "mask", "cu_seqlens"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators(ops: Ops, case: Case, how: str) -> None:
    arguments = inputs(case, 1 if how == "cu_seqlens" else 2, 37, 3)
    if how == "cu_seqlens" and case.with_state:
        arguments = (*arguments[:-1], inputs(case, 3, 1, 3)[-1])

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        packing: dict[str, Tensor] = {}
        if how == "mask":
            packing["mask"] = (torch.arange(37) % 5 > 0).expand(2, -1).to(given[0].device)
        elif how == "cu_seqlens":
            packing["cu_seqlens"] = torch.tensor([0, 20, 20, 37])
        result: tuple[Tensor, Tensor] = getattr(ops, case.op)(*given, **case.options, **packing)
        return result

    assert_alike(function, arguments)


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_wide_heads(form: Any, per_key: bool) -> None:
    arguments = tuple(drawn((2, 19, 2, 3, 4), True, per_key=per_key))
    assert_alike(partial(gate_loop, form=form), arguments)


def test_vmap(ops: Ops) -> None:
    case = CASES[0]
    stacked = tuple(torch.stack((t, 2 * t)) for t in inputs(case, 2, 20, 3))
    assert_alike(torch.func.vmap(lambda *a: call(ops, case, a)), stacked)


def test_low_precision(ops: Ops) -> None:
    low = [torch.randn(2, 100, 3).bfloat16() for _ in range(3)]
    here = ops.simple_gate_loop(*low)
    there = ops.simple_gate_loop(*(t.to(DEVICE) for t in low))
    for ours, theirs in zip(there, here, strict=True):
        # One rounding of a float32 state.
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_models(seed: int, tmp_path: Path) -> None:
    here = drawn_model(seed).double()
    there = copy.deepcopy(here).to(DEVICE)
    if seed % 2:
        fuse(there)
    ids, mask = drawn_ids(seed), torch.arange(29) > torch.tensor([[0], [4]])
    for given in ({}, {"mask": mask}):
        losses = []
        for model, device in ((here, "cpu"), (there, DEVICE)):
            model.zero_grad()
            packing = {name: t.to(device) for name, t in given.items()}
            loss = model(ids.to(device), return_loss=True, **packing)
            loss.backward()
            assert loss.device.type == device
            losses.append(loss.detach().cpu())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-10)
        theirs = dict(here.named_parameters())
        for name, weight in there.named_parameters():
            expected = theirs[name].grad
            assert (weight.grad is None) == (expected is None), name
            if weight.grad is not None:
                torch.testing.assert_close(weight.grad.cpu(), expected, rtol=1e-8, atol=1e-8)
    here.eval(), there.eval()
    tokens = there.generate(ids[:, :3].to(DEVICE), length=4, temperature=0)
    assert tokens.device.type == DEVICE
    assert tokens.tolist() == here.generate(ids[:, :3], length=4, temperature=0).tolist()
    checkpoint.save(there, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model").to(DEVICE)
    torch.testing.assert_close(
        loaded(ids.to(DEVICE)).cpu(), here.float()(ids), rtol=1e-4, atol=1e-4
    )


def test_packed_sequences_in_a_model() -> None:
    here = Transformer(12, num_tokens=17, depth=2, layers="gate_loop,attention", window=5).double()
    there = copy.deepcopy(here).to(DEVICE)
    ids, cuts = drawn_ids(0)[:1], torch.tensor([0, 7, 7, 20, 29])
    theirs = here(ids, return_loss=True, cu_seqlens=cuts)
    for where in ("cpu", DEVICE):
        ours = there(ids.to(DEVICE), return_loss=True, cu_seqlens=cuts.to(where))
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-10, atol=1e-10)


def test_a_training_step_and_recomputed_blocks() -> None:
    torch.manual_seed(0)
    model = Transformer(12, num_tokens=17, depth=2, checkpoint_blocks=True).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = drawn_ids(0).to(DEVICE)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("heinsen", [False, True])
def test_the_small_layer_from_its_cache(heinsen: bool) -> None:
    layer = SimpleGateLoopLayer(8, use_heinsen=heinsen).to(DEVICE)
    x = torch.randn(2, 9, 8).to(DEVICE)
    whole = layer(x)
    first, cache = layer(x[:, :4], return_cache=True)
    second, _ = layer(x[:, 4:], cache=cache, return_cache=True)
    torch.testing.assert_close(
        torch.cat((first, second), 1).cpu(), whole.cpu(), rtol=1e-4, atol=1e-5
    )
