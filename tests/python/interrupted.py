"""Processes that are killed at each of their system calls, a disk that fails there, and what is on
the disk after a loss of power."""

import contextlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CALLS = ((os, "open"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (io, "open"))


class KilledError(BaseException):
    """Stands for the end of the process."""


def interruptions(
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[], object],
    act: Callable[[], object],
    *more: tuple[Any, str],
    stays: bool,
) -> Iterator[int]:
    """Calls act, interrupted at its first call, at its second ... until it is whole.

    prepare() comes before each. Yields after each interruption how many calls came before it.
    stays: every later call fails too, as a killed process makes none; otherwise one call fails, as
    on a disk that was full once. more: functions that count as calls, by owner and name.
    """
    for allowed in itertools.count():
        prepare()
        made = itertools.count()

        def counted(
            function: Callable[..., Any], made: Iterator[int] = made, allowed: int = allowed
        ) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                number = next(made)
                if number == allowed or (stays and number > allowed):
                    raise KilledError if stays else OSError("no space left on device")
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (*CALLS, *more):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            with contextlib.suppress(KilledError, OSError):
                act()
        if next(made) <= allowed:
            return
        yield allowed


def synced_renames(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[Path]:
    """The targets of act's renames, in order.

    Asserts that each file is on the disk before its rename, and its folder before the next.
    """
    synced: dict[Path, int] = {}  # when each was written last
    unsynced: set[Path] = set()  # folders
    targets: list[Path] = []
    fsync = os.fsync

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced[path] = path.stat().st_mtime_ns
        unsynced.discard(path)

    def noted(rename: Callable[..., None]) -> Callable[..., None]:
        def call(source: Path, target: Path) -> None:
            written = Path(source).resolve()
            assert not unsynced, f"{target} is renamed, {unsynced} not yet on the disk"
            assert synced.get(written) == written.stat().st_mtime_ns, f"{source} is not on the disk"
            rename(source, target)
            unsynced.add(written.parent)
            targets.append(Path(target))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(os, "rename", noted(os.rename))
        patch.setattr(os, "replace", noted(os.replace))
        act()
    assert not unsynced, f"{unsynced} not on the disk"
    return targets
