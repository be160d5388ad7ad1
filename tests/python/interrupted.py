"""Processes that are killed at each of their system calls, or a disk that fails there."""

import contextlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
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
