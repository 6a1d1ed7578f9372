"""What a handler does for its peer: each `Work` of the plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import anyio
from anyio import CancelScope, move_on_after, sleep, sleep_forever

from anyio_rst import PeerClose

from .plans import CUT_AFTER, Work
from .wire import PATTERN, REQUEST
from .wire import place as place_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio_rst import Connection, Ending


class Failure(Exception):
    """What a handler raises that was asked to fail."""


class Finished(Exception):
    """What is declared a clean end."""


class Request:
    def __init__(self, header: bytes) -> None:
        self.number, work, self.size, self.upload, timeout = REQUEST.unpack(header)
        self.work = Work(work)
        self.timeout = timeout / 1000
        self.finished: float | None = None  # when the drain began
        place = place_of(self.number)
        # Which send() takes as well, and which copies nothing.
        view = memoryview(PATTERN)[place : place + self.size]
        self.answer = cast("bytes", view)
        self.half = self.answer[: self.size // 2]


async def read_all(conn: Connection, request: Request) -> None:
    received = 0
    async for data in conn:
        received += len(data)
    if received != request.upload:
        raise AssertionError(f"{received} of {request.upload} bytes were uploaded")


def check_ended(conn: Connection) -> Ending:
    if conn.ending is None:
        raise AssertionError("aclose() has returned, and the connection is open")
    return conn.ending


async def answer(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)


async def pieces(conn: Connection, request: Request) -> None:
    step = request.size // 4 + 1
    for start in range(0, request.size, step):
        await conn.send(request.answer[start : start + step])
        await sleep(0.002)


async def close(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    request.finished = anyio.current_time()
    await conn.aclose()
    raise Failure


async def shielded(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    request.finished = anyio.current_time()
    with CancelScope() as cancelled:
        cancelled.cancel()
        with CancelScope(shield=True):
            await conn.aclose()


async def cut(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    request.finished = anyio.current_time()
    with move_on_after(CUT_AFTER) as scope:
        await conn.aclose()
    peer = check_ended(conn).peer
    if not scope.cancelled_caught and peer is PeerClose.NONE:
        raise AssertionError("aclose() was cancelled, and has drained to the limit")


async def cut_by_other(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    request.finished = anyio.current_time()
    draining = anyio.Event()
    ended = None

    async def drain() -> None:
        draining.set()
        await conn.aclose()

    async with anyio.create_task_group() as tg:
        tg.start_soon(drain)
        await draining.wait()
        await sleep(CUT_AFTER)
        with CancelScope() as cancelled:
            cancelled.cancel()
            try:
                await conn.aclose()
            finally:
                ended = conn.ending
    if ended is None:
        raise AssertionError("the second aclose() has left the connection open")


async def finish_on(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    raise Finished


async def group(conn: Connection, request: Request) -> None:
    async with conn.create_task_group() as tg:
        tg.start_soon(sleep_forever)
        await conn.send(request.answer)
        tg.cancel_scope.cancel()


async def eof(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    await conn.send_eof()
    await read_all(conn, request)


async def read_all_answer(conn: Connection, request: Request) -> None:
    await read_all(conn, request)
    await conn.send(request.answer)


async def fail(conn: Connection, request: Request) -> None:
    await conn.send(request.half)
    raise Failure


async def read_all_fail(conn: Connection, request: Request) -> None:
    await read_all(conn, request)
    await conn.send(request.half)
    raise Failure


async def cancel(conn: Connection, request: Request) -> None:
    with move_on_after(0.01):
        async with conn:
            await conn.send(request.half)
            await sleep_forever()


async def give_up(conn: Connection, request: Request) -> None:
    with move_on_after(0.01):
        try:
            await conn.send(request.half)
            await sleep_forever()
        finally:
            await conn.aclose()
            check_ended(conn)


async def forcefully(conn: Connection, request: Request) -> None:
    await conn.send(request.half)
    await anyio.aclose_forcefully(conn)
    check_ended(conn)


async def group_fail(conn: Connection, request: Request) -> None:
    async def child() -> None:
        await conn.send(request.half)
        raise Failure

    async with conn.create_task_group() as tg:
        tg.start_soon(child)
        await sleep_forever()


async def abort(conn: Connection, request: Request) -> None:
    await conn.send(request.half)
    conn.abort()


async def torn(conn: Connection, request: Request) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(conn.send, request.answer)
        await conn.receive(1)  # when the peer has got something
        tg.cancel_scope.cancel()


async def eof_fail(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    await conn.send_eof()
    raise Failure


async def wait(conn: Connection, request: Request) -> None:
    await read_all(conn, request)


async def hold(conn: Connection, request: Request) -> None:
    await conn.send(request.half)
    await sleep_forever()


WORKS: dict[Work, Callable[[Connection, Request], Awaitable[None]]] = {
    Work.ANSWER: answer,
    Work.PIECES: pieces,
    Work.CLOSE: close,
    Work.SHIELDED: shielded,
    Work.CUT: cut,
    Work.CUT_BY_OTHER: cut_by_other,
    Work.FINISH_ON: finish_on,
    Work.GROUP: group,
    Work.EOF: eof,
    Work.READ_ALL: read_all_answer,
    Work.RAISE: fail,
    Work.READ_ALL_RAISE: read_all_fail,
    Work.CANCEL: cancel,
    Work.GIVE_UP: give_up,
    Work.FORCEFULLY: forcefully,
    Work.GROUP_FAIL: group_fail,
    Work.ABORT: abort,
    Work.TORN: torn,
    Work.EOF_RAISE: eof_fail,
    Work.WAIT: wait,
    Work.HOLD: hold,
}
