"""Model directories, whatever computes with them: config.json beside safetensors files.

A safetensors file carries a copy of the model's options, and the "id" of the config.json that it
belongs to. Where the two ids differ, writing was interrupted between the two files, and the copy
holds. So one rename, that of the weights, replaces a whole model. gateloop_jax links to this file.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata as packages
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

FORMAT = 1
CONFIG = "config.json"
WEIGHTS = {"latest": "model.safetensors", "best": "model.best.safetensors"}
Metadata = dict[str, str]


def read_options(folder: Path, weights: str) -> dict[str, Any]:
    """The model's options that these weights need.

    Raises FileNotFoundError or ValueError naming the file.
    """
    path = folder / CONFIG
    config = _object(path, path.read_bytes())
    if not isinstance(options := config.get("model"), dict):
        raise ValueError(f'{path}: not a model configuration: no "model" in it')
    if config.get("format") != FORMAT:
        found = config.get("format")
        raise ValueError(f"{path}: format {found}; this package reads format {FORMAT}")
    file = folder / WEIGHTS[weights]
    metadata = read_metadata(file) if file.is_file() else {}
    if "config" in metadata and metadata.get("config_id") != config.get("id"):
        options = _object(file, metadata["config"].encode())
    return options


def has_documents(folder: Path) -> bool:
    """Whether the model was trained with ``gateloop train --documents``."""
    path = folder / CONFIG
    training = _object(path, path.read_bytes()).get("training")
    return isinstance(training, dict) and training.get("documents") is True


def read_metadata(file: Path) -> Metadata:
    with _opened(file) as content:
        return content.metadata() or {}


class Entry(NamedTuple):
    """A tensor of a safetensors file."""

    dtype: str  # as the format writes it: "F32", "BF16", ...
    shape: tuple[int, ...]


def read_entries(file: Path) -> dict[str, Entry]:
    """The tensors by name, without their numbers. Raises ValueError naming the file."""
    with _opened(file) as content:
        slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
        return {name: Entry(t.get_dtype(), tuple(t.get_shape())) for name, t in slices.items()}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as content:
            yield content
    except SafetensorError as error:
        raise ValueError(f"{file}: not a valid safetensors file: {error}") from error


def _object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a model configuration: not a JSON object")
    return value


def write_model(
    folder: Path,
    options: Mapping[str, Any],
    write_weights: Callable[[Path, Metadata], object],
    distribution: str,
    versions: Mapping[str, str],
    training: Mapping[str, Any] | None = None,
    same_run: bool = False,
) -> None:
    """Make a folder hold this model and no best one; a crash leaves the former model or this one.

    write_weights(path, metadata) writes a safetensors file. distribution: the package that calls;
    versions: of what it computes with, and the revision of its library. same_run: the model is a
    later one of the run that the folder holds, whose provenance it keeps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = json.dumps(dict(options))
    # A digest, so that the same model has the same bytes.
    identifier = hashlib.sha256(model.encode()).hexdigest()[:16]
    config: dict[str, Any] = {"format": FORMAT, "id": identifier, "model": dict(options)}
    if training is not None:
        config["training"] = dict(training)
    config["provenance"] = _kept_provenance(folder) if same_run else []
    latest = _provenance(distribution, versions)
    if not any(entry["command"] == latest["command"] for entry in config["provenance"][-1:]):
        config["provenance"].append(latest)
    text = json.dumps(config, indent=2) + "\n"
    metadata = {"config": model, "config_id": identifier}
    # The weights come first.
    _replace(
        {
            folder / WEIGHTS["latest"]: lambda path: write_weights(path, metadata),
            folder / CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )
    # What was the best of another model is none of this one's.
    (folder / WEIGHTS["best"]).unlink(missing_ok=True)


def _kept_provenance(folder: Path) -> list[dict[str, Any]]:
    path = folder / CONFIG
    if not path.exists():
        return []
    kept = _object(path, path.read_bytes()).get("provenance", [])
    if not (isinstance(kept, list) and all(isinstance(e, dict) and "command" in e for e in kept)):
        raise ValueError(f"{path}: not the configuration of a run: its provenance")
    return kept


def _provenance(distribution: str, versions: Mapping[str, str]) -> dict[str, Any]:
    program = distribution
    with contextlib.suppress(packages.PackageNotFoundError):  # used from a checkout
        program += f" {packages.version(distribution)}"
    # A file name need not be UTF-8; Python keeps such bytes as lone surrogates.
    command = [word.encode(errors="replace").decode() for word in sys.orig_argv]
    return {
        "program": program,
        **versions,
        "processor": _processor(),
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*: (.*)$", info, re.MULTILINE):
            return found[1]
    return platform.machine()


def _replace(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write each file beside its place and to the disk, then rename all, in this order."""
    temporaries = {path: path.with_name(f".{path.name}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            write(temporaries[path])
            _sync(temporaries[path])
        for path, temporary in temporaries.items():
            temporary.replace(path)
            _sync(path.parent)  # this rename is on the disk before the next
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; the files are whole either way.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
