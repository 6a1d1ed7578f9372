import anyio
import pytest
from progress import total

from anyio_rst import serve_tcp
from anyio_rst.testing import assert_fin, assert_rst

pytestmark = pytest.mark.anyio


async def test_the_total(rst_peer):
    async with rst_peer() as (conn, peer):
        await peer.send(b"1\n2\n3\n")
        peer.send_eof()
        await total(conn)
    await assert_fin(peer, b"6\n")


async def test_what_is_no_number_resets(rst_peer):
    with pytest.raises(ValueError, match="two"):
        async with rst_peer() as (conn, peer):
            await peer.send(b"1\ntwo\n3\n")
            peer.send_eof()
            await total(conn)
    await assert_rst(peer)


async def test_a_silent_client_is_reset(rst_connect, monkeypatch):
    monkeypatch.setattr("progress.INTERVAL", 0.1)
    async with anyio.create_task_group() as tg:
        server = await tg.start(serve_tcp, total)
        async with rst_connect(server.port) as peer:
            await assert_rst(peer)
        tg.cancel_scope.cancel()
