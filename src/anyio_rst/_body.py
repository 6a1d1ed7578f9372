"""The end of a body or handler, which ends its connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outcome import Error, Value

from ._ending import Cause, cause_of_exit
from ._task_group import is_stopped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._connection import Connection


async def body_returned(connection: Connection, result: object) -> None:
    """The body has returned: end the connection, if it has not ended before."""
    connection._outcome = Value(result)
    await connection._end(Cause.RETURNED)


async def body_raised(connection: Connection, exc: BaseException) -> None:
    """The body has raised *exc*: the same. A reset is over without a checkpoint."""
    connection._outcome = Error(exc)
    cause = cause_of_exit(exc, connection._finish_on)
    nested = connection._lent is not None
    if nested and cause is Cause.CANCELLED and is_stopped(connection._life):
        return  # a group around the nested scope was stopped: the connection goes on
    await connection._end(cause)


async def run(
    connection: Connection, handler: Callable[[Connection], Awaitable[object]]
) -> None:
    """Run *handler*, and end the connection as its outcome says.

    Raises:
      BaseException: what *handler* raised, after the end of the connection.
    """
    try:
        try:
            result = await handler(connection)
        except BaseException as exc:
            await body_raised(connection, exc)
            raise
        await body_returned(connection, result)
    except BaseException as exc:
        connection._end_after(exc)
        raise
