"""Models on one sequence over many processes: losses and gradients, summed, are the whole's."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from channels import weight_errors
from conftest import thinned
from processes_in_group import in_group
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

from gateloop_cpp import (
    CausalFullAttention,
    GateLoopedAttention,
    SimpleGateLoopLayer,
    Transformer,
    fuse,
)

TIME = 23

# By name, as the parametrization of a model of two layers.
MODELS: dict[str, dict[str, Any]] = {
    "polar": {},
    "sigmoid": dict(gate="sigmoid", normalize_input=True, sub_ln=True),
    "joint kv, without transitions": dict(joint_kv=True, ablate_state_transition=True),
    "magnitude and phase": dict(gate="magnitude_phase", post_ln_norm=True),
    "heads": dict(gate_loop_heads=2, gate="magnitude_phase", per_key_transitions=True),
    "taylor": dict(gate_loop_heads=2, gate_loop_dim_key=6, feature_map="taylor"),
    "simple": dict(layers="none", simple_gate_loop=True),
    "checkpointed": dict(simple_gate_loop=True, checkpoint_blocks=True),
    "window": dict(layers="gate_loop,attention", window=5, rotary_emb=True, dim_head=4, heads=2),
    "relative window": dict(
        layers="attention", window=9, dim_head=4, heads=2, data_dependent_rel_pos=True
    ),
    "window of one": dict(layers="attention", window=1, dim_head=4, heads=2),
    "window of all": dict(layers="attention", window=40, rotary_emb=True, dim_head=4, heads=2),
}


def cuts(processes: int) -> list[list[int]]:
    """Where blocks end: even ones; uneven ones, shorter than a window; empty ones."""
    even = [TIME * i // processes for i in range(processes + 1)]
    uneven = [0, *range(2, processes + 1), TIME]
    return [even, uneven, [0, *[0] * (processes - 1), TIME], [0, *[TIME] * processes]]


def summed(model: nn.Module) -> list[Tensor]:
    """Gradients over all processes, the same on each."""
    sums = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad)
            sums.append(grad)
    return sums


def check_model(name: str, ends: list[int], packing: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    rank = dist.get_rank()
    steps = slice(ends[rank], ends[rank + 1])
    model = Transformer(8, num_tokens=11, depth=2, **MODELS[name]).double()
    rows = 1 if "cu_seqlens" in packing else 2
    ids = torch.randint(11, (rows, TIME))

    def run(model: Transformer, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        model.zero_grad(set_to_none=True)
        logits = model(ids, **options)
        loss: Tensor = model(ids, return_loss=True, **options)
        loss.backward()
        return logits.detach(), loss.detach()

    logits, loss = run(model, ids, **packing)
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    mine = {k: t[:, steps] if k == "mask" else t for k, t in packing.items()}
    close: Callable[..., None] = torch.testing.assert_close
    real = packing["mask"][:, steps] if "mask" in packing else torch.ones_like(ids[:, steps]).bool()
    for each in (model, fuse(copy.deepcopy(model))):
        ours, share = run(each, ids[:, steps], **mine, time_group=dist.group.WORLD)
        dist.all_reduce(share)
        close(ours[real], logits[:, steps][real], rtol=1e-10, atol=1e-10)
        close(share, loss, rtol=1e-10, atol=1e-10)
        for grad, whole in zip(summed(each), expected, strict=True):
            close(grad, torch.zeros_like(grad) if whole is None else whole, rtol=1e-10, atol=1e-10)


def check_models() -> None:
    processes = dist.get_world_size()
    packed = torch.tensor([0, 0, 4, 9, 9, 20, TIME])
    mask = torch.rand(2, TIME, generator=torch.Generator().manual_seed(1)) > 0.3
    for number, name in enumerate(MODELS):
        packings = [{}, {"cu_seqlens": packed}]
        if "window" not in name:
            packings.append({"mask": mask})
        for i, ends in enumerate(cuts(processes)):
            # Every model with every packing, every cut with every packing of some model.
            packing = packings[(number + i) % len(packings)]
            try:
                check_model(name, ends, packing)
            except Exception as error:
                what = f"{name}, {list(packing)}, cut at {ends}, rank {dist.get_rank()}"
                raise AssertionError(what) from error


def check_autocast() -> None:
    """bfloat16 keys, values and gates between processes."""
    torch.manual_seed(0)
    model = Transformer(8, num_tokens=11, depth=2, simple_gate_loop=True, **MODELS["window"])
    ids = torch.randint(11, (2, TIME))
    steps = slice(0, 10) if dist.get_rank() == 0 else slice(10, TIME)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        share = model(ids[:, steps], return_loss=True, time_group=dist.group.WORLD)
        loss = model(ids, return_loss=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, trained, materialize_grads=True)
    share.backward()
    total = share.detach()
    dist.all_reduce(total)
    # bfloat16 has steps of 0.8 %; blocks round partial sums of gradients once more.
    torch.testing.assert_close(total, loss.detach(), rtol=0.01, atol=0)
    for ours, theirs in zip(summed(model), expected, strict=True):
        assert (weight_errors(ours, theirs) <= 0.02).all()


def check_reversed_layer() -> None:
    torch.manual_seed(0)
    layer = SimpleGateLoopLayer(6, reverse=True, post_ln=True).double()
    x = torch.randn(2, 10, 6, dtype=torch.float64)
    rank = dist.get_rank()
    steps = slice(0, 7) if rank == 0 else slice(7, 10)
    ours = layer(x[:, steps], time_group=dist.group.WORLD)
    torch.testing.assert_close(ours, layer(x)[:, steps], rtol=1e-10, atol=1e-10)


def check_refusals() -> None:
    group = dist.group.WORLD
    x, ids = torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.long)
    full = CausalFullAttention(8, dim_head=4, heads=2)
    with pytest.raises(ValueError, match="CausalFullAttention: time_group must be None for atten"):
        full(x, time_group=group)
    window = CausalFullAttention(8, dim_head=4, heads=2, window=2)
    with pytest.raises(ValueError, match="CausalFullAttention: mask must be None over a time_grou"):
        window(x, mask=torch.ones(1, 4, dtype=torch.bool), time_group=group)
    simple = SimpleGateLoopLayer(8, use_heinsen=True)
    with pytest.raises(ValueError, match="SimpleGateLoopLayer: time_group must be None with anoth"):
        simple(x, time_group=group)
    model = Transformer(8, num_tokens=3, depth=1)
    for module, given in ((model, ids), (window, x), (SimpleGateLoopLayer(8), x)):
        with pytest.raises(ValueError, match="return_cache must be False"):
            module(given, return_cache=True, time_group=group)


def check_state_of_the_whole() -> None:
    """What GateLoopedAttention returns is the state after the last block."""
    torch.manual_seed(0)
    layer = GateLoopedAttention(8).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    steps = slice(0, 4) if dist.get_rank() == 0 else slice(4, 9)
    _, ours = layer(x[:, steps], return_cache=True, time_group=dist.group.WORLD)
    torch.testing.assert_close(ours, layer(x, return_cache=True)[1], rtol=1e-10, atol=1e-10)


def threads() -> list[str]:
    """Names, by the system, of this process's threads."""
    tasks = Path("/proc/self/task").iterdir()
    return [(task / "comm").read_text(encoding="utf-8").strip() for task in tasks]


def end_a_group(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store=FileStore(store, 2), rank=rank, world_size=2)
    assert any("gloo" in name for name in threads())
    for name in ("polar", "window"):
        check_model(name, [0, 10, TIME], {})
    dist.destroy_process_group()
    assert not any("gloo" in name for name in threads())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_a_group_ends_with_its_threads(tmp_path: Path) -> None:
    """One that outlives destroy_process_group() may abort the process as Python ends."""
    spawn(end_a_group, (str(tmp_path / "store"),), nprocs=2)


OTHERS = [check_autocast, check_reversed_layer, check_refusals, check_state_of_the_whole]


def run_others() -> None:
    for run in OTHERS:
        run()


@pytest.mark.parametrize(
    ("processes", "checks"), thinned([(3, check_models), (2, check_models), (2, run_others)], 2)
)
def test_sharded_models_equal_whole_ones(processes: int, checks: Callable[[], None]) -> None:
    """All in the same processes, which take seconds to start."""
    in_group(processes, checks)
