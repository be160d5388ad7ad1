"""Reading at full speed, outside of the modules."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp import _spec
from gateloop_cpp._checks import expect
from gateloop_cpp._sharded import Shards
from gateloop_cpp._untouched import difference
from gateloop_cpp.transformer import Reader, Transformer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _TouchedError(ValueError):
    """The modules of a model say more than its weights."""


def _with_file(work: Callable[[bytes], Any], file: str | os.PathLike[str]) -> Any:
    """work(name), whose RuntimeError may have a name in it that is not UTF-8."""
    try:
        return work(os.fsencode(file))
    except UnicodeDecodeError as error:  # of the RuntimeError's words
        raise RuntimeError(os.fsdecode(error.object)) from None


class DecoderState:
    """What a decoder has read: a value, and the same for as long as it is kept.

    Its size is constant, but for full attention, whose keys and values grow; states that came
    one from the other share them.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self._state.batch())

    @property
    def position(self) -> int:
        """Tokens read of each sequence, of the longest where they differ."""
        return int(self._state.position())

    @property
    def positions(self) -> list[int]:
        """(B) tokens read of each sequence."""
        return [int(position) for position in self._state.positions()]

    @property
    def nbytes(self) -> int:
        """Memory of all sequences together."""
        return int(self._state.bytes())

    def select(self, sequences: Sequence[int]) -> "DecoderState":
        """The state of some of the sequences, in this order; one may come several times.

        ValueError for a number outside [0, batch).
        """
        return DecoderState(self._state.select([int(sequence) for sequence in sequences]))

    @staticmethod
    def join(states: "Sequence[DecoderState]") -> "DecoderState":
        """The state of all sequences of some states of one model, one after another.

        ValueError for states of two models.
        """
        return DecoderState(torch.classes.gateloop.State.join([s._state for s in states]))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Replace the file as a whole, or leave it as it was. RuntimeError names what failed."""
        _with_file(self._state.save, file)

    @staticmethod
    def load(file: str | os.PathLike[str]) -> "DecoderState":
        """RuntimeError for a file of another kind or version, and for a damaged one."""
        return DecoderState(_with_file(torch.classes.gateloop.State.load, file))


class Decoder:
    """Reads tokens after tokens without gradients, as the runtime of C++ programs does.

    It goes past the modules and reads the weights where ``model`` has them: they must not change
    meanwhile. Activations and states are float32 whatever the weights are; matrix products with
    bfloat16 weights round what they multiply to bfloat16.

    Args:
        model: an untouched Transformer: its modules are what its options make them, without hooks,
            wrappers or adapters. Their classes and torch.nn.functional have the functions that they
            had when this package was imported. Its parameters are plain tensors of one dtype
            (float32, bfloat16 or float16) on the CPU. Autocast is off.
        threads: default: as many as torch uses, and no more than a container's quota pays for.

    Calls from several threads wait for each other.

    Raises:
        ValueError: naming what was found changed. The model itself then reads the tokens.
    """

    def __init__(self, model: Transformer, threads: int | None = None) -> None:
        found = _obstacle(model)
        expect(found is None, "Decoder", "model", "an untouched Transformer", found, _TouchedError)
        names = list(_spec.describe(model.options)["weights"])
        # Not state_dict(), whose hooks may give other tensors than the modules read.
        tensors = dict(model.named_parameters(remove_duplicate=False))
        self._session = torch.classes.gateloop.Session(
            _spec.as_json(model.options),
            names,
            [tensors[name].detach() for name in names],
            threads,
        )

    def __call__(
        self,
        ids: Tensor,
        cache: DecoderState | None = None,
        last_only: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """Logits after each of the tokens, float32, and the state after them.

        Args:
            ids: (B, T) int64 or int32, B and T ≥ 1.
            cache: the state of the tokens before them; default: the start of a text. Its sequences
                may have come to different positions.
            last_only: the logits after the last token alone, (B, 1, num_tokens), in place of
                (B, T, num_tokens).
            cu_seqlens: (N + 1) int64 or int32: ids are (1, T), of N sequences packed one after
                another, see :mod:`gateloop_cpp.ops`; at least one token of each. Logits are (1, T,
                num_tokens), or (N, 1, num_tokens), and the state is of N sequences.

        Raises:
            ValueError, TypeError: for other ids, and for a state of another model or of another B.
        """
        return self._read(ids, cache, last_only, cu_seqlens, consume=False)

    def _read(
        self,
        ids: Tensor,
        cache: DecoderState | None,
        last_only: bool,
        cu_seqlens: Tensor | None,
        consume: bool,
    ) -> tuple[Tensor, DecoderState]:
        """With ``consume`` the cache is used up: keys and values are written in place."""
        fits = cache is None or isinstance(cache, DecoderState)
        expect(fits, "Decoder", "cache", "a DecoderState", cache, TypeError)
        before = None if cache is None else cache._state
        logits, state = self._session.read(ids, before, last_only, cu_seqlens, consume)
        return logits, DecoderState(state)


def fastest_reader(model: Transformer) -> Reader:
    """By a Decoder of an untouched model, else by the model's modules."""
    try:
        return partial(_read_by_decoder, Decoder(model))
    except _TouchedError:
        return partial(_read_by_modules, model)


def _read_by_decoder(
    decoder: Decoder, ids: Tensor, cache: Any, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Any]:
    logits, after = decoder._read(ids, cache, True, cu_seqlens, consume=True)
    return logits[:, -1], after


def _read_by_modules(
    model: Transformer, ids: Tensor, cache: Any, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Any]:
    packing = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    logits, after = model(ids, cache=cache, return_cache=True, **packing)
    last = logits[:, -1] if cu_seqlens is None else logits[0, cu_seqlens[1:].long() - 1]
    return last, after


def _obstacle(model: Transformer) -> str | None:
    """What keeps a decoder from the model."""
    if Shards(model.parameters()):
        return "parameters sharded over processes"
    if found := difference(model, Transformer):
        return found
    dtype = model.token_emb.weight.dtype
    return None if dtype in _DTYPES else f"parameters of {dtype}"
