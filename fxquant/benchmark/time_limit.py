"""A limit on the time that a block may take, where the platform and the thread allow one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["OutOfTimeError", "time_limit"]


class OutOfTimeError(BaseException):
    """The time is over; no ``Exception``, which a compiler would catch to carry on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTimeError`` inside once the time is over.

    It comes between two steps of Python, so that a long call into C++ ends first. Without ``SIGALRM``, outside of the
    main thread, and where somebody else's alarm is set, there is no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again a second later, should anything swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
