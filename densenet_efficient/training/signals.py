"""SIGTERM and Ctrl-C: who handles them for how long, and what they do to the processes that read images."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """In this block of the main thread; afterwards as before."""
    ours = [number for number in SIGNALS if signal.getsignal(number) is not None]  # else not Python's to set again
    previous = {number: signal.signal(number, handler) for number in ours}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def delayed_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C of this block act at its end."""
    if threading.current_thread() is not threading.main_thread():  # which no handler interrupts
        yield
        return
    received: list[int] = []
    with handled_by(lambda number, _: received.append(number)):
        yield
    for number in received:
        signal.raise_signal(number)


def end_with_the_run(worker: int) -> None:
    """For a process that reads images: signals are for the run alone, which needs it until its step has ended.

    They reach it where they are sent to a whole group, as by Ctrl-C, `timeout` and many a queue.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the thread to see who has sent it
    threading.Thread(target=_wait_for_the_run, daemon=True).start()


def _wait_for_the_run() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
