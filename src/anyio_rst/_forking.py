"""Closing the parent's connections in a forked child.

A copy of its descriptor keeps a connection open, so a peer would hear nothing of the
death of the parent for as long as the child lives (fork(2)). The child closes the copies.
As long as the parent has the connection that sends nothing, and afterwards it is the RST
that was due.

An event loop's epoll instance is shared with the child, so nothing is unregistered there.
A closed descriptor stays registered for as long as the parent has the file: epoll(7), Q6.
"""

from __future__ import annotations

import os
import socket
from threading import RLock
from typing import TYPE_CHECKING
from weakref import ref

from . import _sockets

if TYPE_CHECKING:
    from typing import Protocol

    class HasDescriptor(Protocol):
        def fileno(self) -> int:
            """-1 once it is closed."""
            ...


# Held from before a descriptor comes into being until it is owned. A child that another
# thread forks in between would have it without knowing. Reentrant: a signal handler may
# fork, too.
lock = RLock()

_owned: set[ref[HasDescriptor]] = set()


def own(owned: HasDescriptor) -> None:
    """Close it in every child that is forked from now on, if it is open then.

    A socket is closed as an object. Of anything else it is only known that some object
    unknown to us owns the descriptor.
    """
    _owned.add(ref(owned, _owned.discard))


def disown(owned: HasDescriptor) -> None:
    """Take :func:`own` back."""
    _owned.discard(ref(owned))


def copy_of(sock: socket.socket) -> socket.socket:
    """A second, non-blocking socket for the connection of *sock*, owned if that is.

    Raises:
      OSError: EMFILE or ENFILE, there are no descriptors left.
    """
    with lock:
        copy = _sockets.duplicate(sock)
        if ref(sock) in _owned:
            own(copy)
    copy.setblocking(False)
    return copy


def _close_in_child() -> None:
    try:
        owned = [found for one in list(_owned) if (found := one()) is not None]
        _owned.clear()
        numbers: list[int] = []
        for one in owned:
            if isinstance(one, socket.socket):
                one.close()
            elif (number := one.fileno()) != -1:
                numbers.append(number)
        if numbers:
            _sockets.vacate(numbers)
    finally:
        lock.release()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=lock.acquire,
        after_in_parent=lock.release,
        after_in_child=_close_in_child,
    )
