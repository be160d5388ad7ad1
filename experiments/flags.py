"""Flags as words, of ``gateloop train`` or of a task."""

from collections.abc import Iterable


def merged(words: Iterable[str]) -> tuple[str, ...]:
    """The words, where of several flags of one name the last is kept, in the place of the first.

    ``--gate sigmoid --no-sub-ln --gate polar`` becomes ``--gate polar --no-sub-ln``. A word without
    leading dashes belongs to the flag before it; without one it is NAME=VALUE of its own. A last
    flag without a value after its =, ``--transition-bias=``, leaves all of its name out.
    """
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not flags or not flags[-1][0].startswith("--"):
            flags.append([word])
        else:
            flags[-1].append(word)
    last = {_name(flag[0]): flag for flag in flags}
    places = dict.fromkeys(_name(flag[0]) for flag in flags)
    return tuple(word for name in places if last[name][0][-1] != "=" for word in last[name])


def _name(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").removeprefix("no-")
