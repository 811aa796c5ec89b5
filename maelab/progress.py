"""How far long work is, for people."""

import os
import sys
import time
from collections.abc import Callable

from maelab.names import visible

_THEN = 4.5  # seconds
_said: set[tuple[str, str]] = set()


def heartbeat(what: str, total: int | None = None, first: float = 2.0) -> Callable[[int], None]:
    """A function to call with how much is done: after `first` seconds, and from then on within every five, stderr gets
    a line. Of several processes only the first speaks.

    Args:
        what: is being done.
        total: how much there is to do; None if nobody knows.
        first: seconds until the first line.
    """
    begun = time.monotonic()
    due = begun + first

    def beat(done: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due or os.environ.get("RANK", os.environ.get("NODE_RANK", "0")) != "0":
            return
        due = now + _THEN
        text = f"maelab: {what}: {done}"
        if total is not None:
            rate = done / (now - begun)
            left = f", {in_words((total - done) / rate)} left" if rate else ""
            text += f" of {total}, {rate:.{0 if rate >= 10 else 1}f}/s{left}"
        print(text, file=sys.stderr, flush=True)

    return beat


def in_words(seconds: float) -> str:
    """A time as people say it: '3 h 05 min', '2 min 10 s', '7 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def say_once(line: str, about: str) -> None:
    """A line for people on stderr about a folder, once in a process."""
    if not was_said(line, about):
        print(visible(f"maelab: {line}"), file=sys.stderr)


def was_said(line: str, about: str) -> bool:
    """Whether a line about a folder was said before; from now on it was."""
    known = (line, about) in _said
    _said.add((line, about))
    return known
