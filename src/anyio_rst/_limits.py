"""The limits of drains and times, and the check for the right thread."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

__all__ = ["Drain"]


@dataclass(frozen=True)
class Drain:
    """The limits of the drain: how long a clean end discards what the peer still sends.

    To close a socket with unread input resets the connection and destroys the answer
    that is under way (RFC 2525, 2.17; RFC 9112, 9.6). So a clean end sends its FIN, reads
    and discards until the peer's FIN, and then closes. The first limit that is reached
    ends the drain, too.

    Args:
      timeout: seconds without progress. Progress means that the peer's TCP acknowledges
        data, so a slow reader gets all of it; input from the peer is not progress. It is
        checked once in that time, so the drain may last twice as long. Where progress
        cannot be seen (all but Linux), seconds from our FIN on. 0 discards only what has
        already arrived.
      max_bytes: bytes to discard, or None for no limit.
      total: seconds from our FIN on, or None for no limit.

    Raises:
      TypeError: a limit is not a number.
      ValueError: a limit is negative, NaN or infinite.
    """

    timeout: float = 5.0
    max_bytes: int | None = None
    total: float | None = None

    def __post_init__(self) -> None:
        # What is typed as a number may still be something else in an untyped program.
        check_seconds("Drain timeout", self.timeout)
        if self.total is not None:
            check_seconds("Drain total", self.total)
        max_bytes: object = self.max_bytes
        if max_bytes is None:
            return
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"Drain max_bytes must be an int or None, not {max_bytes!r}")
        if max_bytes < 0:
            raise ValueError(f"Drain max_bytes must be >= 0, not {max_bytes!r}")


def check_seconds(name: str, seconds: float) -> float:
    """*seconds*, called *name* in messages, if it can be waited for that long."""
    given: object = seconds  # an untyped program may give anything
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {given!r}")
    if not math.isfinite(given) or given < 0:
        raise ValueError(f"{name} must be finite and >= 0, not {given!r}")
    return given


def check_keepalive(keepalive: float | None) -> None:
    """Refuse what the kernel cannot count as seconds of silence (tcp(7))."""
    if keepalive is not None and not 1 <= check_seconds("keepalive", keepalive) <= 32767:
        raise ValueError(f"keepalive must be from 1 to 32767 s, not {keepalive!r}")


def check_number(name: str, value: object, least: int, most: int | None) -> None:
    """Refuse what is no int from *least* to *most*; None for no limit."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {bounds}, not {value!r}")


def check_thread(owner: int, call: str) -> None:
    """Refuse *call* in another thread than *owner*, which it could not wake."""
    if threading.get_ident() != owner:
        raise RuntimeError(
            f"{call} belongs to the thread of its event loop: "
            "call it there, with anyio.from_thread.run_sync()"
        )


DEFAULT_DRAIN = Drain()

# A client that has its answer has nothing in flight, and a server that ignores its FIN
# must not hold it up for long.
CLIENTS_DRAIN = Drain(timeout=1.0)


def check_drain(drain: object) -> None:
    """Refuse what is neither a :class:`Drain` nor None."""
    if drain is not None and not isinstance(drain, Drain):
        raise TypeError(f"drain must be a Drain or None, not {drain!r}")
