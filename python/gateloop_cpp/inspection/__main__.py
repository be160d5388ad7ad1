"""Writes a page that shows what a model keeps of a text, byte by byte.

Of every byte: its surprise and what was predicted. Of every layer: how much of its state the byte
erases, and the half-lives of its channels; and the earlier bytes that the prediction leans on. The
page is one file and loads nothing.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gateloop_cpp import _files, _pages, checkpoint, fuse
from gateloop_cpp.inspection.measuring import measure
from gateloop_cpp.inspection.rendering import render

COMMAND = "inspect"
SEPARATOR = b"\xff"  # of documents


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"gateloop {COMMAND}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="directory of a model")
    add(
        "--weights",
        choices=("latest", "best"),
        default="latest",
        help="which of its weights [latest]",
    )
    add("--text", required=True, type=Path, metavar="FILE", help="any bytes")
    add(
        "--no-documents", action="store_true",
        help="without the separators that a model trained with --documents reads around a text",
    )  # fmt: skip
    add("--out", required=True, type=Path, metavar="PAGE", help="the HTML file to write")
    add(
        "--max-bytes", type=_positive, default=100_000, metavar="N",
        help="of the text, from its start [100000]",
    )  # fmt: skip
    add(
        "--channels", type=_positive, metavar="N",
        help="channels of each layer to keep byte by byte [as many as keep a page near 30 MB]",
    )  # fmt: skip
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _options().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        _run(chosen)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 1
    return 0


def _run(chosen: argparse.Namespace) -> None:
    began = time.monotonic()
    text, whole = _read(chosen.text, chosen.max_bytes)
    try:
        model = fuse(checkpoint.load(chosen.checkpoint, chosen.weights))
        apart = not chosen.no_documents and _files.has_documents(chosen.checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(f"--checkpoint {chosen.checkpoint}: {error}") from error
    cut = f" (the first of {whole:,})" if whole > len(text) else ""
    if apart:
        text = _as_document(text, chosen.text, ends=not cut)
    try:
        measured = measure(model, text, chosen.channels)
    except (OSError, ValueError) as error:
        raise ValueError(f"--checkpoint {chosen.checkpoint}: {error}") from error
    source = f"{_pages.as_text(chosen.checkpoint.resolve().name)}, {chosen.weights} weights"
    html = render(measured, _pages.as_text(chosen.text.name), source, whole if cut else None)
    try:
        _pages.write(chosen.out, html)
    except OSError as error:
        raise ValueError(f"--out {chosen.out}: {error.strerror}") from error
    apart_note = ", separators included" if apart else ""
    print(
        f"{len(text):,} bytes{cut}{apart_note}, {measured.bits_per_byte:.4f} bits per byte, "
        f"{time.monotonic() - began:.1f} s; {chosen.out}: {len(html) / 1e6:.1f} MB"
    )


def _as_document(text: bytes, path: Path, ends: bool) -> bytes:
    """As the model was trained to read it: between separators, unless its end is cut off."""
    if SEPARATOR in text:
        place = text.index(SEPARATOR)
        raise ValueError(
            f"--text {path}: must be one document of a model trained with --documents, got"
            f" their separator, 0xFF, at byte {place}: give one document, or --no-documents"
        )
    return SEPARATOR + text + SEPARATOR * ends


def _read(path: Path, most: int) -> tuple[bytes, int]:
    """The first bytes of a file, and how many it has."""
    try:
        with path.open("rb") as file:
            text = file.read(most)
            whole = len(text) + sum(len(part) for part in iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        raise ValueError(f"--text {path}: {error.strerror}") from error
    if len(text) < 2:
        raise ValueError(
            f"--text {path}: must hold 2 bytes or more to predict one, got {len(text)}"
        )
    return text, whole


if __name__ == "__main__":
    sys.exit(main())
