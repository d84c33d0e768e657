"""Ends this process after some time whatever it does, with a message and a code, even while C code
holds the interpreter lock.

Python's faulthandler can print the stacks without that lock, and end the process with code 1. The
message and the code of our own come from timers of the C library whose notification is a C function
called on a thread of its own: `warnx` and `_exit`. Where the C library has no such timers (not
Linux) faulthandler alone is left, and its code 1.
"""

from __future__ import annotations

import ctypes
import faulthandler
import sys

_SIGEV_THREAD, _CLOCK_MONOTONIC = 2, 1
_BETWEEN_SECONDS = 0.3  # message, then stacks, then the end


class _Event(ctypes.Structure):
    """struct sigevent of Linux, 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("_room", ctypes.c_byte * 32),
    )


class _Times(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = (
        ("every_seconds", ctypes.c_long),
        ("every_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class HardExit:
    """At most one end in waiting; arming again puts it off.

    Args:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        # Read by the C library when its time comes
        self._message = ctypes.create_string_buffer(2048)
        self._code = code
        self._timers: list[ctypes.c_void_p] = []

    def arm(self, seconds: float, message: str) -> None:
        """End this process after so many seconds, unless it is armed or disarmed again before.

        Args:
            seconds: from now.
            message: printed before the stacks of all threads, as an error of the engine's.
        """
        # warnx reads its argument as a format; it prints the program's name before it.
        text = f"hvdlarge: error: {message}".replace("%", "%%").encode()[: len(self._message) - 1]
        self._message.value = text
        able = self._timers or self._make_timers()
        if able:
            for timer, after in zip(self._timers, (0.0, 2 * _BETWEEN_SECONDS), strict=True):
                self._set(timer, seconds + after)
        faulthandler.dump_traceback_later(seconds + _BETWEEN_SECONDS, exit=not able)

    def disarm(self) -> None:
        """The end is called off."""
        faulthandler.cancel_dump_traceback_later()
        for timer in self._timers:
            self._set(timer, 0.0)

    def _make_timers(self) -> bool:
        if self._libc is None:
            return False
        try:
            for function, value in (
                (self._libc.warnx, ctypes.addressof(self._message)),
                (self._libc._exit, self._code),
            ):
                event = _Event(
                    value, 0, _SIGEV_THREAD, ctypes.cast(function, ctypes.c_void_p).value, None
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
        times = _Times(0, 0, whole, int(1e9 * (seconds - whole)))
        self._libc.timer_settime(timer, 0, ctypes.byref(times), None)
