"""A text read by a model in chunks, and what is measured on the way.

Memory is bounded by a chunk's activations and by what is kept of a byte. That is in codes of 8 and
16 bits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gateloop_cpp.inspection import codes
from gateloop_cpp.inspection.influence import (
    WINDOW,
    attention_sizes,
    head_sizes,
    max_head_sizes,
    padded,
)
from gateloop_cpp.inspection.recording import NotShown, Source, Steps, find_sources, recording
from gateloop_cpp.ops import linear_recurrence
from gateloop_cpp.transformer import Transformer

#: Bytes that the model reads at once, a multiple of WINDOW. 4096 took 4 per cent longer.
CHUNK = 2048
TOP = 5
# Memory of a head's states, (steps, K, V): wide heads are read in spans that take no more.
_STATES_BYTES = 64 << 20
# Steps of channels kept byte by byte, by default: of 2 bytes, or 3 where transitions are complex.
_KEPT_STEPS = 8_000_000


@dataclass
class Track:
    """Shares of the last WINDOW bytes, those of codes.LEAST_SHARE or more, byte after byte."""

    counts: Tensor  # (T) uint8: entries of each byte
    lags: Tensor  # (entries) uint8: how many bytes back, 0 is the byte itself
    shares: Tensor  # (entries) uint8, codes.decode_share


@dataclass
class Mixer:
    """What is shown of a mixer."""

    layer: int
    kind: str
    channels: int  # heads where they are wider than one channel
    is_max_heads: bool
    half_lives: Tensor | None  # (C) float64: ln 2 / mean rate over the text; None of attention
    forgotten: Tensor | None  # (T) uint8: codes.encode_fraction of what the byte erases
    kept: list[int]  # the channels of the following, by half-life; all heads of attention
    rates: Tensor | None  # (kept, T) uint8: codes.encode_rate
    inputs: Tensor | None  # (kept, T) uint8: codes.encode_size of |k v|; max heads only
    phases: Tensor | None  # (kept, T) uint8: codes.encode_phase; None where a is real
    tracks: list[Track]  # of all channels together, then of each head where heads are wide


@dataclass
class Measurements:
    """Of a text of T bytes."""

    text: bytes
    bits: Tensor  # (T) float64: surprise; the first, which nothing predicts, is 0
    top_tokens: Tensor  # (T, TOP) int64: most probable first
    top_probabilities: Tensor  # (T, TOP) float32
    mixers: list[Mixer]
    not_shown: list[NotShown]

    @property
    def bits_per_byte(self) -> float:
        return float(self.bits.sum()) / (len(self.text) - 1)


def measure(model: Transformer, text: bytes, channels: int | None = None) -> Measurements:
    """Read a text, its state carried from chunk to chunk.

    Args:
        model: on the CPU.
        text: two bytes or more, each a token of the model.
        channels: how many channels of each mixer to keep byte by byte; default: all, or as many as
            have 8 million steps together.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check(model, text, channels)
    sources, not_shown = find_sources(model)
    if not any(source.has_transitions for source in sources):
        reasons = "; ".join(f"layer {o.layer + 1}, {o.kind}: {o.reason}" for o in not_shown)
        found = reasons or "its mixers are attention"
        raise ValueError(f"measure: model must have a GateLoop that can be shown, but {found}")
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unsqueeze(0)
    most = _channels_within(len(text), sources) if channels is None else channels
    readings = [_Reading(source, most) for source in sources]
    predictions: list[Future[tuple[Tensor, Tensor, Tensor]]] = []
    measured: list[Future[None]] = []
    cache = None
    with torch.inference_mode(), recording(sources) as recorded, _threads_beside() as pool:
        for begin in range(0, len(text), CHUNK):
            end = min(begin + CHUNK, len(text))
            logits, cache = model(ids[:, begin:end], cache=cache, return_cache=True)
            _wait(measured)  # a chunk is measured after the one before it
            following = ids[0, begin + 1 : end + 1]
            predictions.append(pool.submit(_predictions, logits[0], following))
            measured = [pool.submit(r.read, recorded(r.source)) for r in readings]
        _wait(measured)
    parts = zip(*(predicted.result() for predicted in predictions), strict=True)
    bits, tokens, probabilities = (torch.cat(part) for part in parts)
    return Measurements(
        text,
        _delayed(bits),
        _delayed(tokens)[: len(text)],
        _delayed(probabilities)[: len(text)],
        [reading.result() for reading in readings],
        not_shown,
    )


def _check(model: Transformer, text: bytes, channels: int | None) -> None:
    if len(text) < 2:
        raise ValueError(f"measure: text must be of 2 bytes or more, got {len(text)}")
    if channels is not None and channels < 1:
        raise ValueError(f"measure: channels must be 1 or more, got {channels}")
    tokens = model.token_emb.num_embeddings
    if max(text) >= tokens:
        expected = f"of bytes below {tokens}, the model's vocabulary"
        raise ValueError(f"measure: text must be {expected}, got {max(text)}")


def _delayed(t: Tensor) -> Tensor:
    """What step t predicts, at byte t + 1; the first byte gets zeros."""
    return torch.cat((torch.zeros_like(t[:1]), t))


@torch.inference_mode()
def _predictions(logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of the bytes that follow, at most one less than logits; the top tokens of each step."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    count = following.shape[0]
    chosen = logits[:count].gather(1, following.unsqueeze(1))
    bits = (normaliser[:count] - chosen).squeeze(1).double() / math.log(2)
    top = logits.topk(min(TOP, logits.shape[1]), dim=-1)
    return bits, top.indices, (top.values - normaliser).exp()


def _channels_within(steps: int, sources: Sequence[Source]) -> int:
    """Channels of each mixer that have _KEPT_STEPS together."""
    with_transitions = sum(source.has_transitions for source in sources)
    return max(1, _KEPT_STEPS // (steps * with_transitions))


def _wait(tasks: Sequence[Future[None]]) -> None:
    for task in tasks:
        task.result()


@contextmanager
def _threads_beside() -> Iterator[ThreadPoolExecutor]:
    """Threads of one core each, on half of the cores; the other half is this thread's.

    The model reads a chunk while the mixers of the one before are measured side by side. On all
    cores the threads would wait for a busy core after each of thousands of short operations.
    """
    cores = torch.get_num_threads()
    workers = max(1, cores // 2)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            torch.set_num_threads(max(1, cores - workers))
            yield pool
    finally:
        torch.set_num_threads(cores)


class _Reading:
    """What has been measured of one mixer so far."""

    def __init__(self, source: Source, channels: int) -> None:
        self.source = source
        self._most = channels
        self._kept: list[int] | None = None
        self._before: Steps | None = None  # the last block of the chunk before
        self._steps = 0
        self._rates = torch.zeros(source.channels, dtype=torch.float64)
        self._parts: dict[str, list[Tensor]] = {}
        self._tracks: list[list[Track]] = []

    @torch.inference_mode()
    def read(self, recorded: Callable[[], Steps]) -> None:
        """Whole blocks, but for the last call."""
        steps = recorded()
        if steps.rate is not None:
            self._read_transitions(steps, steps.rate)
        time = steps.query.shape[0]
        tracks = [_track(sizes[:time]) for sizes in self._sizes(steps)]
        self._tracks = self._tracks or [[] for _ in tracks]
        for parts, track in zip(self._tracks, tracks, strict=True):
            parts.append(track)
        self._steps += time

    def _read_transitions(self, steps: Steps, rate: Tensor) -> None:
        self._rates += rate.sum(0, dtype=torch.float64)
        self._keep("forgotten", codes.encode_fraction(forgotten(steps)))
        if self._kept is None:
            self._kept = _spread(self._rates, self._most)
        self._keep("rates", codes.encode_rate(rate[:, self._kept].T))
        if self.source.is_max_heads:
            self._keep("inputs", codes.encode_size(steps.key[:, self._kept].T))
        if steps.phase is not None:
            self._keep("phases", codes.encode_phase(steps.phase[:, self._kept].T))

    def _keep(self, name: str, part: Tensor) -> None:
        self._parts.setdefault(name, []).append(part)

    def _sizes(self, steps: Steps) -> list[Tensor]:
        """Sizes of the contributions, (T, WINDOW): of all channels, then of each wide head."""
        begin = max(0, WINDOW - self._steps)
        both = [
            self._behind_block(name, steps) for name in ("query", "key", "value", "rate", "phase")
        ]
        self._before = _last_block(steps)
        query, key, value, rate, phase = both
        assert query is not None and key is not None
        if self.source.is_max_heads:
            assert rate is not None
            return [max_head_sizes(query, key, rate, phase)]
        assert value is not None
        if rate is None:
            sizes = attention_sizes(query, key, value, begin, steps.window or WINDOW)
        else:
            sizes = head_sizes(query, key, value, rate, phase)
        sizes = sizes.flatten(1, 2)
        return [torch.linalg.vector_norm(sizes, dim=0), *sizes]

    def _behind_block(self, name: str, steps: Steps) -> Tensor | None:
        """A field of the steps, padded, behind that of the block before; zeros before the first."""
        t: Tensor | None = getattr(steps, name)
        if t is None:
            return None
        t = padded(t, WINDOW)
        zeros = t.new_zeros(WINDOW, *t.shape[1:])
        return torch.cat((zeros if self._before is None else getattr(self._before, name), t))

    def result(self) -> Mixer:
        whole = {name: torch.cat(parts, -1) for name, parts in self._parts.items()}
        shown = self.source.has_transitions
        kept = list(range(self.source.channels)) if self._kept is None else self._kept
        half_lives = math.log(2) * self._steps / self._rates if shown else None
        if half_lives is not None:  # over the whole text now
            order = half_lives[kept].argsort()
            kept = [kept[i] for i in order.tolist()]
            for name in ("rates", "inputs", "phases"):
                if name in whole:
                    whole[name] = whole[name][order]
        return Mixer(
            self.source.layer, self.source.kind, self.source.channels, self.source.is_max_heads,
            half_lives, whole.get("forgotten"), kept, whole.get("rates"), whole.get("inputs"),
            whole.get("phases"), [_joined(parts) for parts in self._tracks],
        )  # fmt: skip


def _last_block(steps: Steps) -> Steps:
    def last(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[-WINDOW:]

    query, key = steps.query[-WINDOW:], steps.key[-WINDOW:]
    value, rate, phase = last(steps.value), last(steps.rate), last(steps.phase)
    return replace(steps, query=query, key=key, value=value, rate=rate, phase=phase)


def _spread(rates: Tensor, most: int) -> list[int]:
    """As many channels, at even distances in the order of their rates, the extremes included."""
    order: list[int] = rates.argsort(descending=True, stable=True).tolist()
    if most >= len(order):
        return order
    if most == 1:
        return [order[len(order) // 2]]
    return [order[round(i * (len(order) - 1) / (most - 1))] for i in range(most)]


def _track(sizes: Tensor) -> Track:
    """The shares (T, WINDOW) that are large enough to keep; sizes may all be zero."""
    shares = sizes / sizes.sum(-1, keepdim=True).clamp_min_(torch.finfo(sizes.dtype).tiny)
    large = shares >= codes.LEAST_SHARE
    places = large.flatten().nonzero().squeeze(1)
    lags = WINDOW - 1 - places % WINDOW
    kept = codes.encode_share(shares.flatten()[places])
    return Track(large.sum(-1).byte(), lags.byte(), kept)


def _joined(tracks: Sequence[Track]) -> Track:
    return Track(
        torch.cat([track.counts for track in tracks]),
        torch.cat([track.lags for track in tracks]),
        torch.cat([track.shares for track in tracks]),
    )


def forgotten(steps: Steps) -> Tensor:
    """Of each step, the share of the state's energy that it erases: (T), 0 where there is none.

    1 - Σ |a_t h_{t-1}|² / Σ |h_{t-1}|², over all channels.
    """
    assert steps.rate is not None
    # Of wide heads: K · V recurrences with one transition.
    if steps.value is None:
        return _forgotten(steps.rate, steps.phase, steps.key, steps.initial_state)[0]
    per_step = 8 * steps.key.shape[1] * steps.key.shape[2] * steps.value.shape[2]
    span = max(1, _STATES_BYTES // per_step)
    state = None if steps.initial_state is None else steps.initial_state.flatten(1)
    parts = []
    for begin in range(0, steps.key.shape[0], span):
        cut = slice(begin, begin + span)
        inputs = steps.key[cut].unsqueeze(3) * steps.value[cut].unsqueeze(2)  # (T, H, K, V)
        times = inputs.shape[2] * inputs.shape[3]
        rate = steps.rate[cut].repeat_interleave(times, 1)
        phase = None if steps.phase is None else steps.phase[cut].repeat_interleave(times, 1)
        part, state = _forgotten(rate, phase, inputs.flatten(1), state)
        parts.append(part)
    return torch.cat(parts)


def _forgotten(
    rate: Tensor, phase: Tensor | None, inputs: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    modulus = (-rate).exp()
    a = modulus if phase is None else torch.polar(modulus, phase)
    first = a.new_zeros(1, a.shape[1]) if state is None else state.to(a.dtype)
    h, final = linear_recurrence(a[None], inputs.to(a.dtype)[None], first)
    before = torch.cat((first, h[0, :-1]))
    energy = before.square() if phase is None else torch.view_as_real(before).square().sum(-1)
    held = (energy * modulus.square()).sum(1)
    total = energy.sum(1)
    return torch.where(total > 0, 1 - held / total, 0), final
