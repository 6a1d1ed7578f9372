"""Which way a connection ends, and the record of how it ended.

The decision is the table :data:`KIND_OF` and the one rule of :func:`verdict`.
Everything else in this library obeys them.
"""

from __future__ import annotations

import asyncio
import enum
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from anyio import current_effective_deadline, get_cancelled_exc_class

if TYPE_CHECKING:
    import outcome

    from ._peer import PeerClose

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

__all__ = ["Cause", "CloseKind", "Ending", "FinishOn", "TLSSession"]

FinishOn: TypeAlias = "type[BaseException] | Iterable[type[BaseException]]"
"""What *finish_on* takes: one type of exception, or several."""


class CloseKind(enum.Enum):
    """What ended the connection."""

    FIN = "FIN"
    """Our FIN, which said *that was all*. Also with a cause that resets, if both sides
    had already finished, since no RST can be sent then."""

    RST = "RST"
    """A reset. If `cause` would have earned a FIN, the connection was gone before the
    FIN left this machine, usually by a reset of the peer.

    Our RST has been sent. On kernels other than Linux, if another process has a copy of
    the descriptor, it is sent when the last copy is closed."""

    DETACHED = "DETACHED"
    """Nothing. The stream was handed back, open."""


class Cause(enum.Enum):
    """Why the connection ended as it did."""

    RETURNED = "RETURNED"
    """The body or handler returned."""

    CLOSED = "CLOSED"
    """`Connection.aclose()`."""

    FINISH_ON = "FINISH_ON"
    """An exception that `finish_on` declares a clean end."""

    RAISED = "RAISED"
    """Any other exception."""

    CANCELLED = "CANCELLED"
    """Cancellation."""

    GROUP_FAILED = "GROUP_FAILED"
    """A child of `Connection.create_task_group()` failed, or an exception group left
    the body."""

    TORN_SEND = "TORN_SEND"
    """It would have been a clean end, but a send had been cut short."""

    ABORTED = "ABORTED"
    """`Connection.abort()`."""

    DETACHED = "DETACHED"
    """`Connection.detach()`."""


KIND_OF = {
    Cause.RETURNED: CloseKind.FIN,
    Cause.CLOSED: CloseKind.FIN,
    Cause.FINISH_ON: CloseKind.FIN,
    Cause.RAISED: CloseKind.RST,
    Cause.CANCELLED: CloseKind.RST,
    Cause.GROUP_FAILED: CloseKind.RST,
    Cause.TORN_SEND: CloseKind.RST,
    Cause.ABORTED: CloseKind.RST,
    Cause.DETACHED: CloseKind.DETACHED,
}


def verdict(cause: Cause, *, torn: bool) -> Cause:
    """The cause that counts: no FIN behind a send that was cut short."""
    if torn and KIND_OF[cause] is CloseKind.FIN:
        return Cause.TORN_SEND
    return cause


def cause_of_exit(
    exc: BaseException | None, finish_on: tuple[type[BaseException], ...]
) -> Cause:
    """What leaving the body with *exc* (None: it returned) means."""
    if exc is None:
        return Cause.RETURNED
    if isinstance(exc, GeneratorExit):
        return Cause.RAISED  # a coroutine that is being closed could not finish anything
    if all_leaves(exc, finish_on):
        return Cause.FINISH_ON
    if all_leaves(exc, _cancelled_class()):
        return Cause.CANCELLED
    if isinstance(exc, BaseExceptionGroup):
        return Cause.GROUP_FAILED
    return Cause.RAISED


def all_leaves(
    exc: BaseException, kind: type[BaseException] | tuple[type[BaseException], ...]
) -> bool:
    """Whether *exc* is of that kind, or a group of nothing else."""
    # Without recursion: a client may choose how deep the groups are.
    waiting = [exc]
    while waiting:
        exc = waiting.pop()
        if isinstance(exc, BaseExceptionGroup):
            waiting.extend(exc.exceptions)
        elif not isinstance(exc, kind):
            return False
    return True


def exception_leaving(
    exc: BaseException | None, at_entry: BaseException | None
) -> BaseException | None:
    """What a block was left by: *exc*, or what began in it and is still being handled.

    So a block that is left by hand, by `finally: await stack.aclose()` for example, is
    not left normally. *at_entry* is what was being handled before.
    """
    if exc is not None:
        return exc
    handled = sys.exc_info()[1]
    return None if handled is at_entry or _was_cancelled(handled) else handled


# asyncio's own in C shows a coroutine nothing of what it does. Not so on PyPy.
_TASKS_ARE_PYTHON = isinstance(asyncio.Task.cancel, FunctionType)


def _was_cancelled(handled: BaseException | None) -> bool:
    """Whether *handled* is a cancellation that is over, and only the task handles it.

    A task written in Python throws into its coroutine while it handles the exception
    itself, which `sys.exc_info()` shows until the coroutine waits again.
    """
    if not (_TASKS_ARE_PYTHON and isinstance(handled, asyncio.CancelledError)):
        return False
    try:
        task: Any = asyncio.current_task()
        return current_effective_deadline() != -math.inf and not task.cancelling()
    except (RuntimeError, AttributeError):  # no event loop; no count before Python 3.11
        return False


def _cancelled_class() -> type[BaseException] | tuple[()]:
    try:
        return get_cancelled_exc_class()
    except RuntimeError:
        return ()  # a coroutine closed outside of any event loop: nobody can cancel


def check_finish_on(finish_on: FinishOn) -> tuple[type[BaseException], ...]:
    """*finish_on* as a tuple.

    Raises:
      TypeError: something in it is not an exception type, or is a type of group, which
        no leaf of a group ever is.
    """
    given: object = finish_on  # an untyped program may give anything
    items = given if isinstance(given, Iterable) else (given,)
    types: list[type[BaseException]] = []
    for item in items:
        if not isinstance(item, type) or not issubclass(item, BaseException):
            raise TypeError(f"finish_on takes exception types, not {item!r}")
        if issubclass(item, BaseExceptionGroup):
            raise TypeError(
                f"finish_on cannot take {item.__name__}: only the leaves of an exception "
                "group are compared"
            )
        types.append(item)
    return tuple(types)


class TLSSession(NamedTuple):
    """What a TLS session agreed on."""

    version: str
    """The version of TLS, as in :meth:`ssl.SSLSocket.version`, for example "TLSv1.3"."""

    cipher: str
    """The name of the cipher suite."""


@dataclass(frozen=True)
class Ending:
    """How one connection ended. Immutable."""

    kind: CloseKind
    """What ended it."""

    cause: Cause
    """Why."""

    outcome: outcome.Outcome[object] | None
    """`outcome.Value` or `outcome.Error` of the body or handler. None while the body
    continues after the connection has ended by `aclose()`, `abort()`, `detach()` or a
    failure of its task group."""

    peer: PeerClose
    """What the peer did, as far as it was seen."""

    remote_address: tuple[str, int] | None
    """(host, port) of the peer; None if the peer was gone before it could be read."""

    discarded: int
    """Bytes read and dropped while draining."""

    unacknowledged: int | None
    """Bytes sent that the peer's TCP had not acknowledged when the socket was closed.
    None if the kernel cannot tell (only Linux can), or if nothing was closed."""

    fin_sent_before_reset: bool
    """Whether the FIN of `send_eof()` was sent before the reset. A peer on Linux that
    only reads then sees a clean end."""

    duration: float
    """Seconds from accept(), or the entry of the scope, to the end of the connection."""

    sent: int
    """Bytes of the body that the kernel has taken. Over TLS, bytes of completed sends
    before encryption."""

    received: int
    """Bytes that the body, or a buffered stream for it, received; over TLS after
    decryption. Discarded bytes are not included."""

    tls: TLSSession | None
    """The TLS session, if there was one at the end."""

    def as_dict(self) -> dict[str, Any]:
        """The same in the plain types of JSON, for logs and metrics.

        Enums become their values. `outcome` becomes `error`: the type and the text of
        the exception, without its traceback, or None.
        """
        error = getattr(self.outcome, "error", None)
        address = self.remote_address
        return {
            "kind": self.kind.value,
            "cause": self.cause.value,
            "error": None
            if error is None
            else {"type": type(error).__qualname__, "text": str(error)},
            "peer": self.peer.value,
            "remote_address": None if address is None else list(address),
            "duration": self.duration,
            "sent": self.sent,
            "received": self.received,
            "discarded": self.discarded,
            "unacknowledged": self.unacknowledged,
            "fin_sent_before_reset": self.fin_sent_before_reset,
            "tls": None if self.tls is None else self.tls._asdict(),
        }
