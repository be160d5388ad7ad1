"""Cases of training and generation in two processes."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from distributed_setting import (
    MODELS,
    WHOLE,
    assert_gradients_of,
    assert_trains_as_one,
    batch,
    case,
    equal,
    gradients,
    largest_error,
    losses,
    make,
    mine,
    refused,
    shard,
    wrap,
)
from gateloop_transformer import Transformer as Peer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gateloop_cpp import (
    CausalFullAttention,
    Decoder,
    GateLoopedAttention,
    SimpleGateLoopLayer,
    fuse,
)
from gateloop_cpp.residual import PreNorm

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SimpleGateLoopLayer": lambda: SimpleGateLoopLayer(16, post_ln=True),
    "GateLoopedAttention": lambda: GateLoopedAttention(16, sub_ln=True),
    "CausalFullAttention": lambda: CausalFullAttention(16, dim_head=8, heads=2, rotary_emb=True),
}
# Whose states are real.
REAL_STATES: dict[str, dict[str, Any]] = {
    "gate": dict(gate="sigmoid"),
    "simple_gate_loop": dict(simple_gate_loop=True),
}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": dict(static_graph=True),
    "find_unused_parameters": dict(find_unused_parameters=True),
    "gradient_as_bucket_view": dict(gradient_as_bucket_view=True),
}


# ---- DistributedDataParallel ---------------------------------------------------------------------


@case(*product(MODELS, FLAGS))
def replicas_train(name: str, flags: str) -> None:
    model = make(name)
    assert_trains_as_one(model, DistributedDataParallel(model, **FLAGS[flags]), make(name))


@case(("static_graph",), ("find_unused_parameters",))
def replicas_with_unused_parameters(flags: str) -> None:
    """Transitions of one leave to_a without a gradient."""
    model, alone = (make(ablate_state_transition=True) for _ in range(2))
    assert_trains_as_one(model, DistributedDataParallel(model, **FLAGS[flags]), alone)


@case()
def replicas_accumulate() -> None:
    model, alone = make("tied"), make("tied")
    wrapped = DistributedDataParallel(model)
    first, second = mine(batch()).chunk(2)
    with wrapped.no_sync():
        wrapped(first, return_loss=True).backward()
    wrapped(second, return_loss=True).backward()
    for part in batch().chunk(2):
        alone(part, return_loss=True).backward()
    assert_gradients_of(model, alone)


@case()
def replicas_generate() -> None:
    """By a decoder that reads the weights of the moment."""
    model = make("tied", torch.float32)
    before = model.generate(batch()[:, :5], 6, temperature=0)
    losses(DistributedDataParallel(model), mine(batch()), steps=20)
    Decoder(model)
    tokens = model.generate(batch()[:, :5], 6, temperature=0)
    assert not torch.equal(tokens, before)
    logits = model(torch.cat((batch()[:, :5], tokens[:, :-1]), 1))
    equal(tokens, logits[:, 4:].argmax(-1))


# ---- FSDP2 ---------------------------------------------------------------------------------------


@case(*product(MODELS, (False, True)))
def shards_train(name: str, reshard: bool) -> None:
    model = make(name)
    assert_trains_as_one(model, shard(model, reshard_after_forward=reshard), make(name))


@case()
def shards_of_the_root_train() -> None:
    model = make("post_norm")
    assert_trains_as_one(model, fully_shard(model), make("post_norm"))


@case()
def shards_of_every_linear_layer_train() -> None:
    model = make("hybrid")
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module)
    assert_trains_as_one(model, fully_shard(model), make("hybrid"))


@case()
def shards_accumulate() -> None:
    model, alone = shard(make("tied")), make("tied")
    for last, part in zip((False, True), mine(batch()).chunk(2), strict=True):
        model.set_requires_gradient_sync(last)
        model(part, return_loss=True).backward()
    for part in batch().chunk(2):
        alone(part, return_loss=True).backward()
    assert_gradients_of(model, alone)


@case(("hybrid",), ("tied",), ("post_norm",))
def shards_made_from_meta(name: str) -> None:
    """No process ever holds the whole model but its weights to begin with."""
    with torch.device("meta"):
        model = make(name)
    shard(model).to_empty(device="cpu")
    set_model_state_dict(model, make(name).state_dict(), options=WHOLE)
    assert_trains_as_one(model, model, make(name))


@case(*product(MODELS, (False, True)))
def shards_generate(name: str, reshard: bool) -> None:
    """Twice; the second time some parameters are whole already."""
    prompt = batch()[:, :5]
    expected = make(name, torch.float32).generate(prompt, 6, temperature=0)
    model = shard(make(name, torch.float32), reshard_after_forward=reshard)
    for _ in range(2):
        equal(model.generate(prompt, 6, temperature=0), expected)


@case()
def shards_generate_different_lengths() -> None:
    """Processes that are done go on for those that are not."""
    rank = dist.get_rank()
    prompt = batch()[rank : rank + 1, : 4 + rank]
    alone = make("hybrid", torch.float32)
    longest = alone.generate(prompt, 9, temperature=0)
    model = shard(make("hybrid", torch.float32))
    equal(model.generate(prompt, 3 + 6 * rank, temperature=0), longest[:, : 3 + 6 * rank])
    stop = [longest[0, :2].tolist()] if rank == 0 else []
    tokens = model.generate(prompt, 9, temperature=0, stop=stop)
    equal(tokens, longest[:, :2] if rank == 0 else longest)


@case()
def a_decoder_refuses_shards() -> None:
    with refused(ValueError, "Decoder: model", "sharded over processes"):
        Decoder(shard(make(dtype=torch.float32)))


# ---- FSDP2 in bfloat16 ---------------------------------------------------------------------------


def low(**options: Any) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, **options)


@case(*product(MODELS))
def low_precision_trains(name: str) -> None:
    model = shard(make(name, torch.float32), mp_policy=low())
    assert model(mine(batch())).dtype == torch.bfloat16
    ours = gradients(model, mine(batch()))
    assert {g.dtype for g in ours.values()} == {torch.float32}
    exact = gradients(make(name), batch())
    assert ours.keys() == exact.keys()
    torchs = largest_error(gradients(make(name, torch.bfloat16), batch()), exact)
    # The same roundings of the same weights, of half the batch at a time. The worst channels of two
    # ways are two draws of them.
    assert 0 < largest_error(ours, exact) < 4 * torchs


@case()
def low_precision_keeps_rotary_positions() -> None:
    """A frequency rounded to bfloat16 would turn step 600 by up to a radian too much."""
    options: dict[str, Any] = dict(use_gate_looped_attn=False, rotary_emb=True, dim_head=8, heads=2)
    x = batch().repeat(1, 46)
    expected = make(dtype=torch.bfloat16, **options)(x)
    equal(shard(make(dtype=torch.float32, **options), mp_policy=low())(x), expected)


@case(*product(MODELS))
def low_precision_generates(name: str) -> None:
    prompt = batch()[:, :5]
    whole = make(name, torch.bfloat16)
    whole.token_emb.register_forward_hook(lambda *_: None)  # by its modules, as the shards
    expected = whole.generate(prompt, 6, temperature=0)
    model = shard(make(name, torch.float32), mp_policy=low(cast_forward_inputs=False))
    equal(model.generate(prompt, 6, temperature=0), expected)


@case(*product(REAL_STATES))
def low_precision_must_not_round_states(option: str) -> None:
    model = shard(make(dtype=torch.float32, **REAL_STATES[option]), mp_policy=low())
    with refused(TypeError, "cache", "cast_forward_inputs=False"):
        model.generate(batch()[:, :5], 2, temperature=0)


# ---- Layers alone, recomputation, compilation, tensor parallelism --------------------------------


@case(*product(LAYERS, (False, True)))
def layers_train(name: str, sharded: bool) -> None:
    torch.manual_seed(0)
    model = LAYERS[name]().double()
    alone, x = copy.deepcopy(model), torch.randn(4, 13, 16, dtype=torch.float64)
    wrapped: Any = fully_shard(model) if sharded else DistributedDataParallel(model)
    wrapped(mine(x)).square().mean().backward()
    alone(x).square().mean().backward()
    assert_gradients_of(model, alone)


@case(*product((False, True), (False, True)))
def recomputation_trains(sharded: bool, wrapper: bool) -> None:
    model = make("hybrid", checkpoint_blocks=not wrapper)
    if wrapper:
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, PreNorm))
    wrapped = wrap(model, sharded)
    assert_trains_as_one(model, wrapped, make("hybrid"))


@case(*product(MODELS, (False, True)))
def fused_trains(name: str, sharded: bool) -> None:
    model = fuse(make(name))
    assert_trains_as_one(model, wrap(model, sharded), make(name))


@case(*product(("hybrid", "post_norm")))
def fused_shards_of_the_root_train(name: str) -> None:
    """Whose parts are looked past."""
    model = fuse(make(name))
    assert_trains_as_one(model, fully_shard(model), make(name))


@case((False,), (True,))
def compiled_trains(sharded: bool) -> None:
    model = make()
    wrapped = wrap(model, sharded)
    assert_trains_as_one(model, torch.compile(wrapped, backend="aot_eager"), make())


@case((False,), (True,))
def as_the_reference_in_one_process(sharded: bool) -> None:
    torch.manual_seed(0)
    theirs = Peer(16, num_tokens=32, depth=3).double()
    model = make()
    model.load_state_dict(theirs.state_dict())
    assert_trains_as_one(model, wrap(model, sharded), theirs)
