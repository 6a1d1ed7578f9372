"""examples/push.py, with plain sockets as its clients."""

from __future__ import annotations

import math
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import anyio
import pytest
from test_readme import connect, free_port
from test_serve_processes import answers, example, loops, read_to_end, running

from anyio_rst import Cause, CloseKind, Ending, PeerClose

import push
from serving import LONG, Peer, Seen, Served, Service, serve, settled

pytestmark = pytest.mark.anyio

LINE = b"%09d" + b" " * 990 + b"\n"


@asynccontextmanager
async def broadcasting() -> AsyncIterator[tuple[push.Broadcast, Service]]:
    broadcast = push.Broadcast()
    async with serve("native", broadcast.serve) as service:
        yield broadcast, service


async def joined(
    service: Service, stack: ExitStack, buffer: int = 0
) -> tuple[Peer, Served]:
    """A client to which everything is sent from now on."""
    peer = stack.enter_context(service.connect(buffer=buffer))
    served = await service.next()
    await settled()
    return peer, served


def kind_and_cause(ending: Ending) -> tuple[CloseKind, Cause]:
    return ending.kind, ending.cause


async def test_everybody_gets_everything_in_one_order() -> None:
    """From several who send at once, and far more than may wait for one client."""
    total = 3 * 5000
    async with broadcasting() as (_, service):
        with ExitStack() as stack:
            peers = [(await joined(service, stack))[0] for _ in range(4)]
            seen: list[Seen] = []

            async def read(peer: Peer) -> None:
                data = await peer.receive(total * 8)
                peer.send_eof()
                rest = await peer.read_to_end()
                seen.append(Seen(data + rest.data, rest.close))

            async with anyio.create_task_group() as tg:
                for peer in peers:
                    tg.start_soon(read, peer)
                for name, peer in zip(b"abc", peers, strict=False):
                    lines = b"".join(b"%c %05d\n" % (name, n) for n in range(5000))
                    tg.start_soon(peer.send, lines)
    first = seen[0]
    assert seen == [first] * 4
    assert first.close is PeerClose.FIN
    for name in b"abc":
        own = [line for line in first.data.splitlines() if line[0] == name]
        assert own == [b"%c %05d" % (name, n) for n in range(5000)]
    assert len(first.data) == total * 8


async def test_slow_client_is_reset_and_the_others_notice_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(push, "PATIENCE", math.inf)
    async with broadcasting() as (broadcast, service):
        with ExitStack() as stack:
            fast = [(await joined(service, stack))[0] for _ in range(3)]
            slow, served = await joined(service, stack, buffer=1)
            number = 0
            while not served.over.is_set():
                assert number < 100_000
                lines = b"".join(LINE % n for n in range(number, number + 500))
                number += 500
                await fast[0].send(lines)
                for peer in fast:
                    assert await peer.receive(len(lines)) == lines
            assert kind_and_cause(await served.ending()) == (
                CloseKind.RST,
                Cause.GROUP_FAILED,
            )
            assert number > push.MAX_BEHIND
            seen = await slow.read_to_end()
            assert seen.close is PeerClose.RST
            everything = b"".join(LINE % n for n in range(number))
            assert everything.startswith(seen.data)
            await fast[1].send(b"still here\n")
            for peer in fast:
                assert await peer.receive(11) == b"still here\n"
            broadcast.close()
            for peer in fast:
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def test_client_that_takes_nothing_for_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although nothing new comes that it could be too far behind of."""
    monkeypatch.setattr(push, "PATIENCE", 0.2)
    monkeypatch.setattr(push, "MAX_BEHIND", 100_000)
    async with broadcasting() as (broadcast, service):
        with ExitStack() as stack:
            slow, served = await joined(service, stack, buffer=1)
            for number in range(20_000):
                broadcast.publish(LINE % number)
            assert kind_and_cause(await served.ending()) == (
                CloseKind.RST,
                Cause.GROUP_FAILED,
            )
            assert (await slow.read_to_end()).close is PeerClose.RST


async def test_close_delivers_what_waits_and_then_fin() -> None:
    async with broadcasting() as (broadcast, service):
        with ExitStack() as stack:
            peer, served = await joined(service, stack, buffer=1)
            for number in range(push.MAX_BEHIND):
                broadcast.publish(LINE % number)
            await settled()
            assert not served.over.is_set()
            broadcast.close()
            late = stack.enter_context(service.connect())
            everything = b"".join(LINE % n for n in range(push.MAX_BEHIND))
            assert await peer.read_to_end() == Seen(everything, PeerClose.FIN)
            assert await late.read_to_end() == Seen(b"", PeerClose.FIN)
            peer.sock.close()
            late.sock.close()
            assert kind_and_cause(await served.ending()) == (
                CloseKind.FIN,
                Cause.RETURNED,
            )


@pytest.mark.parametrize("way", ["FIN", "RST"])
async def test_half_a_line_is_sent_to_nobody(way: str) -> None:
    async with broadcasting() as (_, service):
        with ExitStack() as stack:
            one, served = await joined(service, stack)
            other, _ = await joined(service, stack)
            await one.send(b"a line\nhalf a li")
            assert await other.receive(7) == b"a line\n"
            assert await one.receive(7) == b"a line\n"
            if way == "FIN":
                one.send_eof()
                assert await one.read_to_end() == Seen(b"", PeerClose.RST)
            else:
                one.reset()
            assert (await served.ending()).kind is CloseKind.RST
            await other.send(b"go on\n")
            assert await other.receive(6) == b"go on\n"


async def test_longest_line() -> None:
    longest = b"x" * (push.MAX_LINE - 1) + b"\n"
    async with broadcasting() as (_, service):
        with ExitStack() as stack:
            peer, _ = await joined(service, stack)
            await peer.send(longest)
            assert await peer.receive(len(longest)) == longest
            await peer.send(b"x" + longest)
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
            peer, _ = await joined(service, stack)
            await peer.send(longest[:-1] + b"x")  # and no end
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


@loops
def test_program_ends_with_fin_for_all(loop: str) -> None:
    port = free_port()
    with running([*example("push.py", loop), str(port)]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"serving on {port}\n"
        with connect(port, process) as one, connect(port, process) as other:
            other.sendall(b"I am here\n")  # and so is the one who came before
            answers(other, b"I am here\n")
            answers(one, b"I am here\n")
            process.send_signal(signal.SIGTERM)
            for sock in one, other:
                assert read_to_end(sock) == Seen(b"", PeerClose.FIN)
                sock.close()
            _, errors = process.communicate(timeout=LONG)
    assert (process.returncode, errors) == (0, "")
