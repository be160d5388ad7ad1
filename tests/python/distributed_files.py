"""Cases of checkpoints, tensor parallelism and accelerate in two processes."""

import copy
import os
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_setting import (
    PROCESSES,
    WHOLE,
    batch,
    case,
    close,
    equal,
    full,
    gradients,
    largest_error,
    losses,
    make,
    mine,
    refused,
    shard,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from gateloop_cpp import Decoder, checkpoint

# ---- Checkpoints ---------------------------------------------------------------------------------


@case(*product(("gate_loop", "post_norm", "tied"), (False, True)))
def saved_by_two_loaded_by_one(name: str, reshard: bool) -> None:
    model = shard(make(name, torch.float32), reshard_after_forward=reshard)
    losses(model, mine(batch()))
    model(batch())  # without resharding, parameters stay whole
    folder = Path(f"{name}-{reshard}")
    checkpoint.save(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    state = get_model_state_dict(model, options=WHOLE)
    twin = checkpoint.load(folder)
    equal(twin.state_dict(), state)
    # Whole matrices and shards are multiplied alike.
    equal(
        twin.generate(batch()[:, :5], 6, temperature=0),
        model.generate(batch()[:, :5], 6, temperature=0),
    )


@case(("hybrid",), ("post_norm",), ("tied",))
def saved_by_one_loaded_by_two(name: str) -> None:
    alone = make(name, torch.float32)
    losses(alone, batch())
    folder = Path(f"{name}-one")
    if dist.get_rank() == 0:
        checkpoint.save(alone, folder)
    dist.barrier()
    before = shard(checkpoint.load(folder))  # weights, then shards
    after = shard(make(name, torch.float32))  # shards, then weights
    set_model_state_dict(after, checkpoint.load(folder).state_dict(), options=WHOLE)
    for model in (before, after):
        equal({n: full(t) for n, t in model.state_dict().items()}, alone.state_dict())


@case()
def saving_fails_in_all() -> None:
    """The process that writes has the reason; the other does not wait for ever."""
    model = shard(make("tied", torch.float32))
    checkpoint.save(model, Path("once"))
    first = dist.get_rank() == 0
    kind, words = (FileExistsError, "overwrite=True") if first else (RuntimeError, "first process")
    with refused(kind, words):
        checkpoint.save(model, Path("once"))
    checkpoint.save(model, Path("once"), overwrite=True)


@case()
def a_wrapper_is_refused() -> None:
    wrapped: Any = DistributedDataParallel(make(dtype=torch.float32))
    with refused(
        ValueError, "save: model", "of a wrapper the model in it", "DistributedDataParallel"
    ):
        checkpoint.save(wrapped, Path("wrapper"))
    assert not (Path("wrapper")).exists()


# ---- Tensor parallelism and Hugging Face accelerate ---------------------------------------------


@case()
def parallel_tensors() -> None:
    """Of feed-forwards: generation, refusal by a decoder, saving."""
    model, alone = make(dtype=torch.float32), make(dtype=torch.float32)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for _, feed in model.layers:
        parallelize_module(feed.fn, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    prompt = batch()[:, :5]
    equal(model.generate(prompt, 6, temperature=0), alone.generate(prompt, 6, temperature=0))
    with refused(ValueError, "sharded over processes"):
        Decoder(model)
    checkpoint.save(model, Path("parallel"))
    equal(checkpoint.load(Path("parallel")).state_dict(), alone.state_dict())


def new_accelerator(**options: Any) -> Accelerator:
    """All share their settings, those of the first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


@case((1,), (2,))
def accelerate_trains(accumulation: int) -> None:
    accelerator = new_accelerator(gradient_accumulation_steps=accumulation)
    plain, alone = make("tied"), make("tied")
    rows: Any = DataLoader(TensorDataset(batch()), 2 // accumulation)
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-2)
    model, optimizer, rows = accelerator.prepare(plain, optimizer, rows)
    for (x,) in rows:
        with accelerator.accumulate(model):
            accelerator.backward(model(x, return_loss=True))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    optimizer = torch.optim.AdamW(alone.parameters(), 1e-2)
    alone(batch(), return_loss=True).backward()
    nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    optimizer.step()
    unwrapped: Any = accelerator.unwrap_model(model)
    close(unwrapped.state_dict(), alone.state_dict())

    folder = Path(f"accelerate-{accumulation}")
    accelerator.save_state(str(folder / "state"))
    if accelerator.is_main_process:
        checkpoint.save(unwrapped, folder / "model")
    accelerator.wait_for_everyone()
    torch.testing.assert_close(
        checkpoint.load(folder / "model").state_dict(), alone.float().state_dict()
    )
    trained = copy.deepcopy(unwrapped.state_dict())
    with torch.no_grad():
        unwrapped.token_emb.weight.zero_()
    accelerator.load_state(str(folder / "state"))
    equal(unwrapped.state_dict(), trained)
    assert unwrapped.token_emb.weight is unwrapped.get_parameter(unwrapped.logits_weight)


@case()
def accelerate_in_bfloat16() -> None:
    """Its autocast is in the forward of the instance: generation then calls the modules."""
    accelerator = new_accelerator(mixed_precision="bf16")
    model = accelerator.prepare(make(dtype=torch.float32))
    ours = gradients(model, mine(batch()))
    exact = gradients(make(), batch())
    found = {n.removeprefix("module."): g for n, g in ours.items()}
    torchs = largest_error(gradients(make(dtype=torch.bfloat16), batch()), exact)
    # As in low_precision_trains, with weights that are not rounded.
    assert 0 < largest_error(found, exact) < 4 * torchs
    unwrapped: Any = accelerator.unwrap_model(model)
    with refused(ValueError, "Decoder: model", "forward"):
        Decoder(unwrapped)
    assert unwrapped.generate(batch()[:, :5], 6, temperature=0).shape == (4, 6)


def plugin(around: str = "PreNorm") -> FullyShardedDataParallelPlugin:
    """As the README has it."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[around],
    )


@case()
def accelerate_replicates_on_cpus() -> None:
    """Silently: accelerate reads the plugin on devices alone."""
    accelerator = new_accelerator(fsdp_plugin=plugin())
    del os.environ["ACCELERATE_USE_FSDP"]  # that it sets would be read in the next cases
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    assert isinstance(accelerator.prepare(make()), DistributedDataParallel)


@case(("gate_loop",), ("tied",), ("post_norm",), ("hybrid",))
def accelerate_shards(name: str) -> None:
    """Its own code for FSDP2, which runs on CPUs too once it is chosen."""
    accelerator = new_accelerator()
    for shared in (PartialState(), accelerator.state):
        shared.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin("PostNorm" if name == "post_norm" else "PreNorm")
    alone, rows = make(name), DataLoader(TensorDataset(batch()), 2)
    whole, optimizer = make(name), torch.optim.AdamW(alone.parameters(), 1e-2)
    alone(batch(), return_loss=True).backward()
    nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    optimizer.step()
    optimizer = torch.optim.AdamW(whole.parameters(), 1e-2)
    prepared: tuple[Any, Any, Any] = accelerator.prepare(whole, optimizer, rows)
    model, optimizer, rows = prepared
    assert all(isinstance(p, DTensor) for p in model.parameters())
    for (x,) in rows:
        accelerator.backward(model(x, return_loss=True))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    unwrapped: Any = accelerator.unwrap_model(model)
    prompt = batch()[:, :5]
    equal(unwrapped.generate(prompt, 6, temperature=0), alone.generate(prompt, 6, temperature=0))
    with refused(ValueError, "sharded over processes"):
        Decoder(unwrapped)

    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        close(dict(state), alone.state_dict())
    folder = Path(f"accelerate-shards-{name}")
    checkpoint.save(unwrapped, folder / "model")
    twin = checkpoint.load(folder / "model")
    torch.testing.assert_close(twin.state_dict(), alone.float().state_dict())
    accelerator.save_state(str(folder / "state"))
    trained = {name: full(tensor) for name, tensor in unwrapped.state_dict().items()}
    with torch.no_grad():
        for parameter in unwrapped.parameters():
            parameter.zero_()
    accelerator.load_state(str(folder / "state"))
    equal({name: full(tensor) for name, tensor in unwrapped.state_dict().items()}, trained)
