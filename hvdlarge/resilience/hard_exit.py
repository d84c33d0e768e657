"""Ends this process after a timeout, with a message and an exit code, even while C code holds the
interpreter lock.

Python's faulthandler prints the stacks without that lock, but can only exit with code 1. Message
and exit code come from POSIX timers that call C functions, `warnx` and `_exit`, in a new thread.
Where the C library has no such timers (not Linux), faulthandler ends the process with code 1.
"""

from __future__ import annotations

import ctypes
import faulthandler
import sys

_SIGEV_THREAD, _CLOCK_MONOTONIC = 2, 1
_DELAY_SECONDS = 0.3  # from the message to the stacks, and from these to the exit


class _Event(ctypes.Structure):
    """struct sigevent of Linux, 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("_padding", ctypes.c_byte * 32),
    )


class _TimerSpec(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class HardExit:
    """A timer that ends this process; arming it again replaces the timeout.

    Args:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        # Read by the C library when the timer fires, so it must stay alive
        self._message = ctypes.create_string_buffer(2048)
        self._code = code
        self._timers: list[ctypes.c_void_p] = []

    def arm(self, seconds: float, message: str) -> None:
        """End this process after a timeout, unless it is armed again or disarmed before.

        Args:
            seconds: from now.
            message: printed as an error of the engine, before the stacks of all threads.
        """
        # warnx takes a format string, and prints the program's name before it
        text = f"hvdlarge: error: {message}".replace("%", "%%").encode()[: len(self._message) - 1]
        self._message.value = text
        has_timers = bool(self._timers) or self._make_timers()
        if has_timers:
            for timer, delay in zip(self._timers, (0.0, 2 * _DELAY_SECONDS), strict=True):
                self._set(timer, seconds + delay)
        faulthandler.dump_traceback_later(seconds + _DELAY_SECONDS, exit=not has_timers)

    def disarm(self) -> None:
        """Cancel the exit, and delete its timers."""
        faulthandler.cancel_dump_traceback_later()
        for timer in self._timers:
            assert self._libc is not None
            self._libc.timer_delete(timer)
        self._timers.clear()

    def _make_timers(self) -> bool:
        if self._libc is None:
            return False
        try:
            for function, argument in (
                (self._libc.warnx, ctypes.addressof(self._message)),
                (self._libc._exit, self._code),
            ):
                event = _Event(
                    argument, 0, _SIGEV_THREAD, ctypes.cast(function, ctypes.c_void_p).value, None
                )
                timer = ctypes.c_void_p()
                if self._libc.timer_create(
                    _CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)
                ):
                    raise OSError("no timer")
                self._timers.append(timer)
        except (AttributeError, OSError):
            self._timers.clear()
        return bool(self._timers)

    def _set(self, timer: ctypes.c_void_p, seconds: float) -> None:
        assert self._libc is not None
        whole = int(seconds)
        spec = _TimerSpec(0, 0, whole, int(1e9 * (seconds - whole)))
        self._libc.timer_settime(timer, 0, ctypes.byref(spec), None)
