"""The log records about handlers that failed."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, IncompleteRead

from ._ending import Cause, all_leaves
from ._peer import ConnectionLost

if TYPE_CHECKING:
    from ._connection import Connection

logger = logging.getLogger("anyio_rst")

# Seconds between two records of one kind, where any client can make a server write them.
QUIET_TIME = 1.0

# The verdicts that come from outside of the handler, which then cannot go on.
_FROM_OUTSIDE = {Cause.CLOSED, Cause.ABORTED, Cause.CANCELLED}


# What a receive says of the peer's FIN.
_ENDS = (EndOfStream, IncompleteRead)


class HandshakeFailed(Exception):
    """The outcome of a connection whose handler was never called."""


class FailureLog:
    """The records of one server.

    What was ordered is no failure: DEBUG. What any client can provoke is INFO, without a
    traceback, and at most one record per :data:`QUIET_TIME` and kind; the others are
    DEBUG, and their number is told by the next one. The rest is ERROR.
    """

    def __init__(self, finish_on: tuple[type[BaseException], ...]) -> None:
        self._finish_on = finish_on
        self._quiet_until: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def report(self, connection: Connection, failure: BaseException) -> None:
        """Say that the handler of *connection*, which has ended, raised *failure*."""
        if all_leaves(failure, self._finish_on):
            logger.debug("a handler ended with %r: %r", failure, connection)
        elif _was_ended_from_outside(connection, failure):
            logger.debug("a handler was still running: %r", connection, exc_info=failure)
        elif _never_spoke(connection, failure):
            logger.debug("the peer left without a word: %r: %s", connection, failure)
        elif isinstance(failure, HandshakeFailed):
            self._inform("handshakes", "%s: %r", failure, connection)
        elif all_leaves(failure, ConnectionLost):
            self._inform("losses", "the peer went away: %r: %s", connection, failure)
        else:
            logger.error("a handler failed: %r", connection, exc_info=failure)

    def _inform(self, kind: str, message: str, *args: object) -> None:
        now = monotonic()
        if now < self._quiet_until.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            logger.debug(message, *args)
            return
        self._quiet_until[kind] = now + QUIET_TIME
        left_out = self._left_out.pop(kind, 0)
        if left_out:
            message += " (and %d more like this since the last record)"
            args = (*args, left_out)
        logger.info(message, *args)

    def close(self) -> None:
        """Tell of what was left out, and no record has followed."""
        for kind, left_out in self._left_out.items():
            logger.info("%d more failed %s since the last record", left_out, kind)
        self._left_out.clear()


def _was_ended_from_outside(connection: Connection, failure: BaseException) -> bool:
    ending = connection.ending
    if ending is None or ending.cause not in _FROM_OUTSIDE:
        return False
    if isinstance(failure, HandshakeFailed) and failure.__cause__ is not None:
        failure = failure.__cause__
    return all_leaves(failure, ClosedResourceError)


def _never_spoke(connection: Connection, failure: BaseException) -> bool:
    """Whether it looks like a health check, which connects and leaves."""
    life = connection._life
    if isinstance(failure, HandshakeFailed):
        cause = failure.__cause__
        return not life.native.received and isinstance(cause, (ConnectionLost, *_ENDS))
    if life.stream.received:
        return False
    if not life.stream.sent and all_leaves(failure, BrokenResourceError):
        return True
    return all_leaves(failure, _ENDS)


def drop_frames(failure: BaseException) -> None:
    """Cut the tracebacks off *failure* and off all exceptions that it refers to.

    Their frames refer to the connection, which refers to the failure: a cycle, in which a
    handler's variables would wait for the garbage collector.
    """
    waiting: list[BaseException | None] = [failure]
    seen: set[int] = set()
    while waiting:
        exc = waiting.pop()
        if exc is None or id(exc) in seen:
            continue
        seen.add(id(exc))
        exc.__traceback__ = None
        waiting += exc.__cause__, exc.__context__
        waiting += getattr(exc, "exceptions", ())
