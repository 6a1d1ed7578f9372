"""The pytest plugin of `anyio_rst.testing`: its context managers as fixtures.

Fixtures that return async context managers work in the tests of every plugin for async
tests. A suite that uses none of them pays for the import of this file, and no more: it
lies outside of the package for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from anyio_rst import Connection
    from anyio_rst.testing import Capture, Peer, Proxy


@pytest.fixture
def rst_pair() -> Callable[
    ..., AbstractAsyncContextManager[tuple[Connection, Connection], None]
]:
    """`anyio_rst.testing.open_pair`: `async with rst_pair() as (client, server):`"""
    from anyio_rst.testing import open_pair

    return open_pair


@pytest.fixture
def rst_peer() -> Callable[
    ..., AbstractAsyncContextManager[tuple[Connection, Peer], None]
]:
    """`anyio_rst.testing.open_peer`: `async with rst_peer() as (conn, peer):`"""
    from anyio_rst.testing import open_peer

    return open_peer


@pytest.fixture
def rst_connect() -> Callable[..., AbstractAsyncContextManager[Peer, None]]:
    """`anyio_rst.testing.connect_peer`: `async with rst_connect(port) as peer:`"""
    from anyio_rst.testing import connect_peer

    return connect_peer


@pytest.fixture
def rst_proxy() -> Callable[..., Proxy]:
    """`anyio_rst.testing.open_proxy`: `async with rst_proxy(port) as proxy:`

    In a test that is not async, `with rst_proxy(port) as proxy:`.
    """
    from anyio_rst.testing import open_proxy

    return open_proxy


@pytest.fixture
def rst_segments() -> Callable[[int], AbstractContextManager[Capture]]:
    """`anyio_rst.testing.capture_segments`: `with rst_segments(port) as capture:`

    Skips the test where segments cannot be captured.
    """
    from anyio_rst.testing import CaptureUnavailable, capture_segments

    try:
        with capture_segments(0):
            pass
    except CaptureUnavailable as exc:
        pytest.skip(str(exc))
    return capture_segments
