"""Bytes of a file as `gateloop train` takes them, for the Python twins of it: the same windows.

With a tokenizer the numbers are its tokens instead.
"""

import argparse
import bz2
import codecs
import gzip
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Bytes: TypeAlias = np.ndarray[Any, Any]  # an array of uint8
Tokens: TypeAlias = np.ndarray[Any, Any]  # an array of int32, or bytes

# By their first bytes.
PACKED = {
    b"\x1f\x8b": gzip.decompress,
    b"\xfd7zXZ\0": lzma.decompress,
    b"\x5d\0\0": lzma.decompress,
}
PACKED |= {b"BZh%d1AY" % level: bz2.decompress for level in range(1, 10)}
UNREAD = {b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z", b"Rar!\x1a": "rar"}
UNREAD |= {b"\x04\x22\x4d\x18": "lz4"}
CONTINUATIONS = bytes(range(0x80, 0xC0))  # which begin no character of UTF-8


def read(path: Path, split: str | None) -> tuple[Bytes, Bytes]:
    """What to train on and what to validate on. FILE may be compressed (gzip, xz, bzip2).

    split: how many bytes of each, "N,N"; None: 90 and 5 per cent.
    """
    content = path.read_bytes()
    for magic, kind in UNREAD.items():
        if content.startswith(magic):
            raise SystemExit(f"{path}: is a {kind} file: unpack it first")
    for magic, unpack in PACKED.items():
        if content.startswith(magic):
            content = unpack(content)
            break
    text = np.frombuffer(content, np.uint8)
    if split is None:
        valid = len(text) // 20
        train = len(text) - 2 * valid
    else:
        train, valid = map(int, split.split(","))
    if train + valid > len(text):
        raise SystemExit(f"{path}: the split is larger than the file of {len(text)} bytes")
    return text[:train], text[train : train + valid]


def described(options: argparse.Namespace, split: list[int]) -> dict[str, Any]:
    """The training as config.json has it, under the names of `gateloop train`.

    gateloop_cpp.watch, track and report read it. options: of either program; split: bytes of each
    part.
    """
    names = [
        *("steps", "batch", "length", "learning_rate", "warmup_steps", "clip", "seed"),
        *("validate_every", "validation_windows"),
    ]
    # A file name need not be UTF-8, which JSON is.
    data = str(options.data.resolve()).encode(errors="replace").decode()
    values = {name: getattr(options, name) for name in names}
    return {"data": data, "split": split, "accumulation": 1, **values}


def check_lengths(parts: tuple[Tokens, Tokens], path: Path, length: int, unit: str) -> None:
    """Ends the program where a part is shorter than a sequence and the number that follows it.

    unit: what the parts hold, "bytes" or "tokens".
    """
    for part, use in zip(parts, ("train", "validate"), strict=True):
        if len(part) <= length:
            raise SystemExit(
                f"{path}: the part to {use} on holds {len(part)} {unit}, --length {length} needs "
                f"{length + 1}: use a longer text, a smaller --length or another --split"
            )


def open_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, of which a text has one sequence of tokens.

    What the file says of other uses is off: truncation, padding, and dropout of merges, by which
    each process would have other tokens.
    """
    from tokenizers import Tokenizer  # which bytes do not need

    if not path.is_file():
        raise SystemExit(f"--tokenizer {path}: no such file, expected a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own
        raise SystemExit(f"--tokenizer {path}: not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    return tokenizer


def tokenized(text: Bytes, tokenizer: Any, name: str) -> Tokens:
    """The tokens of UTF-8, int32, without those that a model's template adds.

    tokenizer: of open_tokenizer(). It takes pieces of about a megabyte that end with a line;
        no token crosses from one into the next.
    name: of the text, for the error where it is no UTF-8.

    A character that a split cuts is left out.
    """
    whole = text.tobytes().lstrip(CONTINUATIONS)
    try:
        lines = codecs.getincrementaldecoder("utf-8")().decode(whole).splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise SystemExit(f"{name}: a tokenizer takes UTF-8, and this is none: {error}") from error
    pieces: list[list[str]] = [[]]
    size = 0
    for line in lines:
        if size > 1 << 20:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    found = tokenizer.encode_batch(["".join(piece) for piece in pieces], add_special_tokens=False)
    return np.concatenate([np.array(piece.ids, np.int32) for piece in found])


def mix(x: int) -> int:
    """The finaliser of SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def batch_at(text: Tokens, step: int, rows: Iterable[int], length: int, seed: int) -> Tokens:
    """(len(rows), length + 1): these rows of what `gateloop train` takes at this step.

    text: of more than length numbers.
    """
    places = len(text) - length
    starts = [mix(mix(mix(seed) ^ step) ^ row) * places >> 64 for row in rows]
    return np.stack([text[start : start + length + 1] for start in starts])


def windows(text: Tokens, count: int, length: int) -> Tokens:
    """Evenly spaced, (count or as many as there are, length + 1); always the same.

    text: of more than length numbers.
    """
    available = (len(text) - 1) // length
    count = min(count, available)
    starts = [i * available // count * length for i in range(count)]
    return np.stack([text[start : start + length + 1] for start in starts])
