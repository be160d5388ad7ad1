"""The ways in which public projects call the layer, written from their calling conventions."""

import torch
from parity import peer
from torch import Tensor, nn

from gateloop_cpp import SimpleGateLoopLayer


def twins(**options: bool) -> tuple[nn.Module, nn.Module]:
    """The peer's layer and ours with the same weights."""
    torch.manual_seed(0)
    theirs = peer.SimpleGateLoopLayer(16, **options)
    ours = SimpleGateLoopLayer(16, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(ours: Tensor, theirs: Tensor) -> None:
    # float32, values of order 1, sums of 16 to some hundred terms.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_cached_decoding_of_a_stack_as_in_meshgpt() -> None:
    """Residual layers; with a cache only the newest position goes in, and a list of caches goes
    round."""
    stacks = list(zip(*(twins() for _ in range(3)), strict=True))

    def run(layers: tuple[nn.Module, ...], x: Tensor, caches: list[object]) -> Tensor:
        for i, layer in enumerate(layers):
            y, caches[i] = layer(x, cache=caches[i], return_cache=True)
            x = x + y
        return x

    x = torch.randn(2, 12, 16)
    outputs = []
    for layers in stacks:
        caches: list[object] = [None] * 3
        pieces = [run(layers, x[:, :6], caches)]
        pieces += [run(layers, x[:, i : i + 1], caches) for i in range(6, 12)]
        outputs.append(torch.cat(pieces, dim=1))
    close(outputs[1], outputs[0])
    close(outputs[1], run(stacks[1], x, [None] * 3))


def test_post_ln_as_in_voicebox() -> None:
    theirs, ours = twins(post_ln=True)
    x = torch.randn(2, 60, 16)
    close(ours(x) + x, theirs(x) + x)


def test_time_of_each_variate_as_in_itransformer() -> None:
    """(batch, variates, time, dim) folded into one batch, without a copy of our own."""
    theirs, ours = twins()
    x = torch.randn(2, 7, 24, 16)
    folded = x.flatten(0, 1)
    close(ours(folded).view_as(x), theirs(folded).view_as(x))


def test_huge_batch_of_tiny_sequences_as_in_magvit2() -> None:
    """A video (batch, channels, time, height, width): every pixel is a sequence of some frames."""
    theirs, ours = twins()
    video = torch.randn(2, 16, 5, 32, 32)

    def along_time(layer: nn.Module) -> Tensor:
        pixels = video.permute(0, 3, 4, 2, 1).flatten(0, 2)  # (2048, 5, 16)
        y: Tensor = layer(pixels) + pixels
        return y.view(2, 32, 32, 5, 16).permute(0, 4, 3, 1, 2)

    close(along_time(ours), along_time(theirs))


def test_pretrained_weights_as_in_voicerestore() -> None:
    """A checkpoint of a larger model, written with the peer's layers inside, loads strictly."""

    def model(layer: type[nn.Module]) -> nn.Module:
        blocks = [nn.ModuleList([layer(16), nn.Linear(16, 16)]) for _ in range(2)]
        return nn.ModuleDict({"transformer": nn.ModuleList(blocks)})

    pretrained = model(peer.SimpleGateLoopLayer)
    restored = model(SimpleGateLoopLayer)
    restored.load_state_dict(pretrained.state_dict(), strict=True)
    x = torch.randn(1, 30, 16)
    for i in range(2):
        name = f"transformer.{i}.0"
        close(restored.get_submodule(name)(x), pretrained.get_submodule(name)(x))
