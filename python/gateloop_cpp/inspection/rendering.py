"""Measurements as one HTML file that needs nothing else."""

import base64
import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from html import escape
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from gateloop_cpp.inspection import codes
from gateloop_cpp.inspection.influence import WINDOW
from gateloop_cpp.inspection.measuring import Measurements, Mixer, Track

# Surprise is kept in steps of 2^-11 bits, up to 32 bits.
_BIT_CODES = 2048
_SCRIPTS = ("numbers.js", "text.js", "panel.js", "main.js")


def render(measured: Measurements, title: str, source: str, whole_bytes: int | None = None) -> str:
    """The HTML of a page.

    Args:
        title: of the text.
        source: what the model was read from.
        whole_bytes: of the text, where only its beginning was measured.
    """
    arrays = _Arrays()
    meta = _meta(measured, arrays)
    meta["title"] = title
    meta["summary"] = _summary(measured, source, whole_bytes)
    parts = {
        "title": escape(title),
        "style": _file("page.css"),
        "window": str(WINDOW),
        "least_share": f"{codes.LEAST_SHARE:.1%}",
        # In a script no text ends it, nor opens a comment, without this character.
        "meta": json.dumps(meta).replace("<", "\\u003c"),
        "arrays": "\n".join(arrays.elements()),
        "script": "\n".join(_file(name) for name in _SCRIPTS),
    }
    html = _file("page.html")
    before = []
    for name, part in parts.items():
        head, html = html.split("{{" + name + "}}")
        before += [head, part]
    return "".join([*before, html])


def _file(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8").strip()


def _summary(measured: Measurements, source: str, whole_bytes: int | None) -> str:
    length = len(measured.text)
    cut = "" if whole_bytes in (None, length) else f"the first of {whole_bytes:,} "
    bits = f"{measured.bits_per_byte:.4f} bits per byte"
    return f"{length:,} bytes{', ' + cut.strip() if cut else ''} · {bits} · {source}"


class _Arrays:
    """Script elements that hold arrays, deflated, in base64."""

    def __init__(self) -> None:
        self._contents: list[bytes] = []

    def elements(self) -> list[str]:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            texts = list(threads.map(_packed, self._contents))
        return [
            f'<script type="text/plain" id="{self._name(i)}">{text}</script>'
            for i, text in enumerate(texts)
        ]

    @staticmethod
    def _name(i: int) -> str:
        return f"array-{i}"

    def add(self, t: Tensor | bytes | None) -> dict[str, str] | None:
        if t is None:
            return None
        if isinstance(t, bytes):
            content, kind = t, "uint8"
        else:
            # In the page numbers are little-endian.
            array = t.contiguous().numpy()
            content = (array if sys.byteorder == "little" else array.byteswap()).tobytes()
            kind = str(array.dtype)
        self._contents.append(content)
        return {"id": self._name(len(self._contents) - 1), "type": kind}


def _packed(content: bytes) -> str:
    # Level 1 saves a third; level 6 saves 2 per cent more in one and a half the time.
    return base64.b64encode(zlib.compress(content, 1)).decode("ascii")


def _meta(measured: Measurements, arrays: _Arrays) -> dict[str, Any]:
    bits = (measured.bits * _BIT_CODES).round().clamp(0, 65535).to(torch.uint16)
    return {
        "bytes": len(measured.text),
        "bitCodes": _BIT_CODES,
        "top": measured.top_tokens.shape[1],
        "halfLives": codes.HALF_LIVES,
        "sizes": codes.SIZES,
        "text": arrays.add(measured.text),
        "surprise": arrays.add(bits),
        "topTokens": arrays.add(measured.top_tokens.to(torch.uint16)),
        "topProbabilities": arrays.add(codes.encode_share(measured.top_probabilities)),
        "mixers": [_mixer(mixer, arrays) for mixer in measured.mixers],
        "notShown": [
            {"layer": other.layer, "kind": other.kind, "reason": other.reason}
            for other in measured.not_shown
        ],
    }


def _mixer(mixer: Mixer, arrays: _Arrays) -> dict[str, Any]:
    half_lives = None
    if mixer.half_lives is not None:
        # JSON has no infinity.
        half_lives = [float(f"{x:.4g}") for x in mixer.half_lives.clamp(max=1e9).tolist()]
    return {
        "layer": mixer.layer,
        "kind": mixer.kind,
        "channels": mixer.channels,
        "isMaxHeads": mixer.is_max_heads,
        "halfLives": half_lives,
        "kept": mixer.kept,
        "forgotten": arrays.add(mixer.forgotten),
        "rates": arrays.add(mixer.rates),
        "inputs": arrays.add(mixer.inputs),
        "phases": arrays.add(mixer.phases),
        "tracks": [_track(track, arrays) for track in mixer.tracks],
    }


def _track(track: Track, arrays: _Arrays) -> dict[str, Any]:
    return {
        "counts": arrays.add(track.counts),
        "lags": arrays.add(track.lags),
        "shares": arrays.add(track.shares),
    }
