"""A wrapper goes around a `Connection`, and has its say at a clean end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint
from anyio.streams.buffered import BufferedByteStream
from anyio.streams.stapled import StapledByteStream

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    PeerClose,
    connection_scope,
    scoped,
)

from serving import (
    LONG,
    Seen,
    assert_finished,
    assert_reset,
    connection_of,
    ending_with,
    foreign_pair,
    serve,
)

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


class Wrapper(anyio.abc.ByteStream):
    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self.stream = stream

    @property
    def extra_attributes(self) -> Any:
        return self.stream.extra_attributes

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self.stream.receive(max_bytes)

    async def send(self, item: bytes) -> None:
        await self.stream.send(item)

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


class Subclass(Wrapper, anyio.abc.SocketStream):
    @property
    def _raw_socket(self) -> Any:
        return self.extra(SocketAttribute.raw_socket)


# Around a stream that is no Connection.


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        Subclass,
        lambda stream: StapledByteStream(stream, stream),
        lambda stream: BufferedByteStream(Wrapper(stream)),
        lambda stream: Wrapper(BufferedByteStream(stream)),
    ],
    ids=["wrapper", "subclass", "stapled", "buffered around it", "around buffered"],
)
async def test_wrapper_around_another_stream_is_refused(
    wrap: Callable[[Any], Any],
) -> None:
    async def handler(conn: Connection) -> None:
        raise AssertionError("it got a connection")

    stream, peer = await foreign_pair()
    with peer:
        peer.sock.sendall(b"there")
        message = "scope the stream inside it, and wrap the Connection"
        with pytest.raises(TypeError, match=message):
            connection_scope(wrap(stream))
        with pytest.raises(TypeError, match=message):
            await scoped(handler)(wrap(stream))
        # It is untouched.
        assert await stream.receive() == b"there"
        await stream.send(b"back")
        await stream.aclose()
        assert await peer.read_to_end() == Seen(b"back", PeerClose.FIN)


# Around a Connection.


class Flushing(Wrapper):
    """Keeps back what is sent, as compressors do."""

    kept = b""

    async def send(self, item: bytes) -> None:
        self.kept += item

    async def aclose(self) -> None:
        await self.stream.send(self.kept + b".")
        await self.stream.aclose()


class InTaskGroup(Flushing):
    async def aclose(self) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.sleep, 0.01)
            tg.start_soon(super().aclose)


class UnderLock(Flushing):
    lock = None

    async def aclose(self) -> None:
        self.lock = anyio.Lock()
        async with self.lock:
            await anyio.sleep(0.01)
            await super().aclose()


class Shielded(Flushing):
    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)
            await super().aclose()


class InThread(Flushing):
    async def aclose(self) -> None:
        await anyio.to_thread.run_sync(time.sleep, 0.01)
        await super().aclose()


class NotClosing(Flushing):
    """Does not close what it is around."""

    async def aclose(self) -> None:
        await self.stream.send(self.kept + b".")


class Empty(Flushing):
    """One that counts what it keeps, and is false when that is nothing."""

    def __len__(self) -> int:
        return len(self.kept)


class ClosingTwice(Flushing):
    async def aclose(self) -> None:
        await super().aclose()
        await self.stream.aclose()


CLOSINGS = pytest.mark.parametrize(
    "wrapper",
    [
        Flushing,
        InTaskGroup,
        UnderLock,
        Shielded,
        InThread,
        NotClosing,
        Empty,
        ClosingTwice,
    ],
)


async def check_that_the_task_is_well() -> None:
    """What a wrapper has opened is closed again."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        await checkpoint()
    assert scope.cancelled_caught
    async with anyio.create_task_group() as tg:
        tg.start_soon(checkpoint)
    with anyio.fail_after(LONG):
        await anyio.sleep(0.001)


@CLOSINGS
async def test_clean_end_lets_the_wrapper_send_what_it_kept(
    kind: str, wrapper: type[Flushing]
) -> None:
    async with connection_of(kind) as (conn, peer):
        around = wrapper(conn)
        async with anyio.create_task_group() as tg:
            tg.start_soon(peer._leave)
            async with connection_scope(around, drain=Drain(LONG)) as inner:
                await inner.send(b"ans")
                await inner.send(b"wer")
        ending_with(CloseKind.FIN, inner, Cause.RETURNED)
        await check_that_the_task_is_well()
        if isinstance(around, UnderLock):
            assert around.lock is not None
            assert not around.lock.locked()
    await assert_finished(conn, peer, Cause.RETURNED, b"answer.")


@CLOSINGS
async def test_failure_resets_and_the_wrapper_sends_nothing(
    kind: str, wrapper: type[Flushing]
) -> None:
    async with connection_of(kind) as (conn, peer):
        await conn.send(b"before")
        with pytest.raises(Failure):
            async with connection_scope(wrapper(conn)) as inner:
                await inner.send(b"kept")
                raise Failure
        ending_with(CloseKind.RST, inner, Cause.RAISED)
        await check_that_the_task_is_well()
    await assert_reset(conn, peer, Cause.RAISED, b"before")


@CLOSINGS
async def test_cancellation_in_a_wrappers_end_resets(
    kind: str, wrapper: type[Flushing]
) -> None:
    """What it kept back has not been sent, or not by a task that has the time."""
    async with connection_of(kind) as (conn, peer):
        with anyio.CancelScope() as scope:
            async with connection_scope(wrapper(conn), drain=None) as inner:
                await inner.send(b"kept")
                scope.cancel()
        assert inner.ending is not None
        seen = await peer.read_to_end()
        # A shield is a shield.
        assert seen.close.value == inner.ending.kind.value
        assert seen.data == (b"kept." if seen.close is PeerClose.FIN else b"")
        assert (seen.close is PeerClose.FIN) == (wrapper is Shielded)
        await check_that_the_task_is_well()


class Raising(Wrapper):
    async def aclose(self) -> None:
        await checkpoint()
        raise Failure


async def test_wrapper_that_cannot_close_resets_and_says_why(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        with pytest.raises(Failure):
            async with connection_scope(Raising(conn)) as inner:
                await inner.send(b"answer")
        ending_with(CloseKind.RST, inner, Cause.RAISED)
    await assert_reset(conn, peer, Cause.RAISED, b"answer")


class RaisingLate(Wrapper):
    async def aclose(self) -> None:
        await self.stream.aclose()
        raise Failure


async def test_wrapper_that_raises_once_it_has_closed_has_finished(kind: str) -> None:
    async with connection_of(kind, drain=None) as (conn, peer):
        with pytest.raises(Failure):
            async with connection_scope(RaisingLate(conn), drain=None) as inner:
                await inner.send(b"answer")
    await assert_finished(conn, peer, Cause.RETURNED, b"answer")


async def test_wrapper_in_a_wrapper_is_closed_from_the_outside(kind: str) -> None:
    async with connection_of(kind, drain=None) as (conn, peer):
        around = Flushing(Flushing(conn))
        async with connection_scope(around, drain=None) as inner:
            await inner.send(b"answer")
    await assert_finished(conn, peer, Cause.RETURNED, b"answer..")


class Framed(Wrapper):
    """Ends where the frame ends."""

    left = 10

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if not self.left:
            raise anyio.EndOfStream
        data = await self.stream.receive(min(max_bytes, self.left))
        self.left -= len(data)
        return data


@pytest.mark.parametrize("ends", ["FIN", "RST"])
async def test_end_of_a_wrappers_frame_is_not_the_peers_fin(kind: str, ends: str) -> None:
    async def handler(conn: Connection) -> None:
        async with connection_scope(Framed(conn), drain=Drain(LONG)) as inner:
            frame = b"".join([chunk async for chunk in inner])
            assert frame == b"x" * 10
            await inner.send(answer)

    answer = bytes(1_000_000)
    async with serve(kind, handler, drain=Drain(LONG)) as service:
        with service.connect(buffer=4096) as peer:
            peer.sock.sendall(b"x" * 10 + b"y" * 5)
            served = await service.next()
            assert await peer.receive(len(answer)) == answer
            if ends == "FIN":
                await peer.send(b"z" * 5)
                peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            if ends == "RST":
                peer.reset()
            ending = await served.ending()
    assert ending.kind is CloseKind.FIN
    assert ending.peer.value == ends
    assert ending.discarded == (10 if ends == "FIN" else 5)
