"""HTML pages on the disk, and names of files in them, which may be any bytes."""

import os
from pathlib import Path


def as_text(name: str) -> str:
    """A file's name; a byte that is not UTF-8 is written as \\xff."""
    return os.fsencode(name).decode(errors="backslashreplace")


def write(page: Path, text: str) -> None:
    """A reader gets the old page or the new one. Raises OSError."""
    content = text.encode(errors="replace")
    if page.exists() and not page.is_file():
        page.write_bytes(content)  # a device, which a rename would replace
        return
    part = page.with_name(page.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(page)
    finally:
        part.unlink(missing_ok=True)
