"""What the cases in two processes share: models, batches, and what one process alone gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from channels import weight_errors
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gateloop_cpp import Transformer

PROCESSES = 2
CASES: dict[str, Callable[[], object]] = {}
MODELS: dict[str, dict[str, Any]] = {
    "gate_loop": {},
    "tied": dict(tie_embeddings=True),
    "wide_heads": dict(gate_loop_heads=4, sub_ln=True),
    "post_norm": dict(post_ln_norm=True, tie_embeddings=True),
    "magnitude_phase": dict(gate="magnitude_phase", normalize_input="variance"),
    "sigmoid": dict(gate="sigmoid", normalize_input=True, simple_gate_loop=True),
    "hybrid": dict(
        layers="gate_loop,attention,none", window=4, simple_gate_loop=True,
        dim_head=8, heads=2, rotary_emb=True,
    ),
}  # fmt: skip
WHOLE = StateDictOptions(full_state_dict=True)
# float64: what differs is the order of sums of some hundred terms, through three steps of AdamW.
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def case(*arguments: tuple[Any, ...]) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Registers a function that both processes call, once for each tuple of arguments."""

    def register(function: Callable[..., object]) -> Callable[..., object]:
        for each in arguments or ((),):
            CASES["-".join(map(str, (function.__name__, *each)))] = partial(function, *each)
        return function

    return register


def make(name: str = "gate_loop", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return Transformer(16, num_tokens=32, depth=3, **MODELS[name] | options).to(dtype)


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(32, (4, 13), generator=generator)


def mine(whole: Tensor) -> Tensor:
    """This process's half of the rows."""
    return whole.chunk(PROCESSES)[dist.get_rank()]


def shard(model: Any, **options: Any) -> Any:
    for layer in model.layers:
        for part in layer:
            if any(True for _ in part.parameters()):
                fully_shard(part, **options)
    return fully_shard(model, **options)


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / PROCESSES


def wrap(model: Any, sharded: bool) -> Any:
    """FSDP2 or DistributedDataParallel."""
    return shard(model) if sharded else DistributedDataParallel(model)


def losses(model: Any, x: Tensor, steps: int = 3) -> list[Tensor]:
    """Of some steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found = []
    for _ in range(steps):
        loss = model(x, return_loss=True)
        loss.backward()
        found.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_trains_as_one(model: Any, wrapped: Any, alone: Any) -> None:
    """Losses and weights; AdamW turns a wrong gradient into a wrong weight of size 1e-2."""
    ours = [mean(loss) for loss in losses(wrapped, mine(batch()))]
    close(ours, losses(alone, batch()))
    state = {name: full(tensor) for name, tensor in model.state_dict().items()}
    close(state, alone.state_dict())
    dist.barrier()


def assert_gradients_of(model: Any, alone: Any) -> None:
    expected = {name: p.grad for name, p in alone.named_parameters()}
    found = {name: p.grad for name, p in model.named_parameters()}
    close({n: g if g is None else full(g) for n, g in found.items()}, expected)


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert all(word in str(error) for word in words), f"{words} are not in: {error}"
    else:
        raise AssertionError(f"no {kind.__name__}")


def largest_error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all their channels. In low precision terms cancel: a row counts as no
    smaller than a quarter of the largest."""
    return max(
        float(weight_errors(full(g), exact[n], float(exact[n].abs().max()) / 4).max())
        for n, g in gradients.items()
    )


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    model(x, return_loss=True).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
