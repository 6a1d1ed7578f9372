"""Waiting for a socket to have input.

AnyIO's `wait_readable` registers the socket with the event loop for each wait. Where the
loop has asyncio's documented `add_reader()`, a connection stays registered between its
waits, which an exchange of messages then costs nothing.
"""

from __future__ import annotations

import asyncio
import select
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from anyio import (
    get_cancelled_exc_class,
    notify_closing,
    wait_readable,
    wait_writable,
)
from anyio.lowlevel import cancel_shielded_checkpoint

from . import _sockets

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Reader: TypeAlias = "RegisteredReader | WaitingReader"

# Wake-ups for nothing, in a row, before the socket's error queue is emptied. Until then
# it can be read by those who asked for what is in it.
MOST_IN_VAIN = 16


def reader_for(sock: socket.socket) -> Reader:
    """What waits for the input of *sock* on the running event loop."""
    # Not by get_running_loop() alone: Trio may run as a guest of asyncio.
    on_asyncio = get_cancelled_exc_class() is asyncio.CancelledError
    if on_asyncio:
        reader = RegisteredReader(asyncio.get_running_loop(), sock.fileno())
        with suppress(NotImplementedError):  # a ProactorEventLoop
            reader.register()
            return reader
    return WaitingReader(sock, is_trios=not on_asyncio)


async def wait_for_room(sock: socket.socket) -> None:
    """Until a send on *sock* would take something, or fail, and sometimes too early.

    Raises:
      anyio.ClosedResourceError: *sock* is being closed.
    """
    for _ in range(MOST_IN_VAIN):
        await wait_writable(sock)
        if not _has_only_errors(sock):
            return
    _discard_errors(sock.fileno())


def is_writable(sock: socket.socket) -> bool:
    """Whether a send would take something, or fail, without waiting."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        return bool(poll.poll(0))
    return bool(select.select([], [sock], [], 0)[1])  # Windows: any number of sockets


def _has_only_errors(sock: socket.socket) -> bool:
    """Whether it is nothing but the error queue that wakes who waits to send."""
    if not _sockets.ERRQUEUE or sock.fileno() == -1:  # closed since it woke
        return False
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return [event for _, event in poll.poll(0)] == [select.POLLERR]


def _discard_errors(descriptor: int) -> None:
    if _sockets.ERRQUEUE:
        with _sockets.blocking_kept(descriptor):
            sock = socket.socket(fileno=descriptor)
        with suppress(OSError):
            while True:
                sock.recvmsg(1, 0, _sockets.ERRQUEUE | _sockets.DONTWAIT)
        sock.detach()


def tell_waiters(sock: socket.socket) -> None:
    """Wake who waits for *sock*, which is about to be closed, by AnyIO's functions."""
    with suppress(RuntimeError):  # no event loop: nobody is waiting
        notify_closing(sock)


def close_copy(sock: socket.socket) -> None:
    """Wake who waits for *sock* by AnyIO's functions, and close it.

    On asyncio those who wake take back, a turn later, what is registered for its number
    then. So long no other connection may have that.
    """
    tell_waiters(sock)
    try:
        if get_cancelled_exc_class() is asyncio.CancelledError:
            loop = asyncio.get_running_loop()
            with suppress(NotImplementedError):  # a ProactorEventLoop
                loop.remove_reader(sock)  # the user's own
                loop.remove_writer(sock)
            loop.call_soon(sock.close)
            return
    except RuntimeError:  # no event loop, or one that has a transport on it
        pass
    sock.close()


class WaitingReader:
    """AnyIO's way: on Trio, and where an event loop has no `add_reader()`."""

    __slots__ = ("_sock", "_waiting", "is_trios")

    def __init__(self, sock: socket.socket, *, is_trios: bool) -> None:
        self.is_trios = is_trios
        self._sock = sock
        self._waiting = False

    async def wait(self, has_read: Callable[[], bool]) -> None:
        """Call *has_read* whenever there is input, until it returns true.

        Raises:
          anyio.ClosedResourceError: :meth:`close` was called.
        """
        self._waiting = True
        try:
            while True:
                for _ in range(MOST_IN_VAIN):
                    await wait_readable(self._sock)
                    if has_read():
                        return
                _discard_errors(self._sock.fileno())
        finally:
            self._waiting = False

    def pause(self) -> None:
        """Take no notice of input until the next wait."""

    def forget(self, sock: socket.socket) -> None:
        """Let go of *sock*, which nobody refers to any more; from any thread."""

    def close(self) -> None:
        """Wake who waits, and forget the descriptor, which is about to be closed."""
        if self._waiting:
            tell_waiters(self._sock)


class RegisteredReader:
    """The same by a callback, which stays registered between two waits.

    It holds no reference to the connection between them: a connection that is forgotten
    has to be collected, and with it reset.
    """

    __slots__ = (
        "_descriptor",
        "_has_read",
        "_in_vain",
        "_lasts",
        "_loop",
        "_registered",
        "_waiter",
    )
    is_trios = False

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
        self._loop = loop
        self._descriptor = descriptor
        self._registered = False
        # libuv drops a registration with the first error (uv__poll_io() in its
        # unix/poll.c), which may come along with input, and uvloop does not tell.
        self._lasts = isinstance(loop, asyncio.SelectorEventLoop)
        self._waiter: asyncio.Future[None] | None = None
        self._has_read: Callable[[], bool] | None = None
        self._in_vain = 0

    def register(self) -> None:
        self._registered = True  # first, lest an exception of a signal handler's leave it
        self._loop.add_reader(self._descriptor, self._on_input)

    async def wait(self, has_read: Callable[[], bool]) -> None:
        if not self._registered:
            self.register()
        elif not self._lasts and has_read():
            await cancel_shielded_checkpoint()
            return
        self._has_read = has_read
        self._waiter = waiter = self._loop.create_future()
        try:
            await waiter
        except BaseException:
            self.pause()
            raise
        finally:
            self._has_read = self._waiter = None

    def _on_input(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            # Its task has not run since, or does something else with the last input.
            self.pause()
        elif self._has_read is not None and self._has_read():
            # Reading here, and not in the task, takes the input away before the loop
            # looks again, and would find it a second time.
            waiter.set_result(None)
            self._in_vain = 0
        else:
            self._in_vain += 1
            if self._in_vain % MOST_IN_VAIN == 0:
                _discard_errors(self._descriptor)
            if not self._lasts:
                self.pause()
                self.register()

    def pause(self) -> None:
        if self._registered:
            with suppress(RuntimeError):  # the loop is closed, and holds nothing
                self._loop.remove_reader(self._descriptor)
            self._registered = False

    def forget(self, sock: socket.socket) -> None:
        if not self._registered:
            return
        with suppress(RuntimeError):  # no loop is running here, or it is closed
            if asyncio.get_running_loop() is self._loop:
                self.pause()
                return
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._let_go, sock)

    def _let_go(self, sock: socket.socket) -> None:
        self.pause()
        sock.close()

    def close(self) -> None:
        self.pause()
        if self._waiter is not None and not self._waiter.done():
            with suppress(RuntimeError):  # the same
                self._waiter.set_result(None)
