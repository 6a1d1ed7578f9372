"""However a process dies, what its connections had earned is what their peers get.

Every death meets every phase that a connection may be in, judged by a plain socket. The
servers are child processes: see dying.py.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import ssl
import subprocess
import sys
import termios
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme

from anyio_rst import PeerClose

from dying import BACKLOG, ENDLESS_ANSWER, HALF, HANDSHAKES, LONG_ANSWER, REQUEST, WHOLE
from serving import DISSOLVES, LONG, Peer, Seen, arrived, queued

# A way to die, and the exit status that shows that it was this one. Of these nothing
# knows but the kernel ...
SUDDEN = {
    "os._exit": 7,
    "SIGKILL": -signal.SIGKILL,
    "SIGTERM": -signal.SIGTERM,
    "SIGSEGV": -signal.SIGSEGV,
    "abort": -signal.SIGABRT,
}
# ... and with these everything is cancelled first.
ORDERLY = {
    "sys.exit": 5,
    "SIGINT": -signal.SIGINT,
    "KeyboardInterrupt": -signal.SIGINT,
    "exception": 1,
    "return from main": 0,
}
DEATHS = SUDDEN | ORDERLY

LOOPS_AND_KINDS: list[Any] = [
    pytest.param(loop, kind, id=f"{loop}-{kind}")
    for loop in ("asyncio", "uvloop", "trio")
    for kind in ("native", "foreign", "trio")
    if kind != "trio" or loop == "trio"
]

# The phase of a connection, what it is then, and what a peer gets of it that reads only
# after the death: the answer, and how that ends.
PHASES = {
    BACKLOG: ("", "nothing, RST"),
    # The body runs.
    "accepted": ("open", "nothing, RST"),
    "half sent": ("open", "half, RST"),
    "sending": ("open", "a part, RST"),
    "half a ClientHello": ("open", "nothing, RST"),
    "ClientHello answered": ("open", "nothing, RST"),
    "TLS half sent": ("open", "half, RST"),
    # It has sent its FIN itself: if that has arrived, only a peer that goes on writing
    # learns of the RST.
    "half-closed": ("open", "whole, FIN, RST"),
    "half-closed, answer under way": ("open", "a part, RST"),
    # It has returned: FIN. The kernel goes on delivering ...
    "drain": ("finishing", "whole, FIN"),
    "drain, answer under way": ("finishing", "whole, FIN"),
    "TLS close": ("finishing", "whole, close_notify, FIN"),
    # ... until there is input that nobody reads (RFC 2525, 2.17) ...
    "drain, unread input": ("finishing", "whole, FIN, RST"),
    "drain, answer under way, unread input": ("finishing", "a part, RST"),
    "drain, answer under way, input after the death": ("finishing", "a part, RST"),
    # ... and there is no FIN before the close_notify.
    "TLS close without room": ("finishing", "half, RST"),
}

if not DISSOLVES:  # gVisor has no RST for what comes after the close
    PHASES["drain, answer under way, input after the death"] = ("finishing", "whole, FIN")

# A drain that is cut short reads what has arrived.
READ_WHEN_CUT_SHORT = {
    "drain, unread input": "whole, FIN",
    "drain, answer under way, unread input": "whole, FIN",
}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("process_death") / "certificate.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(path)
    return path


class Server:
    """A process of dying.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def hear(self) -> dict[str, Any]:
        """What it announces next."""
        assert self.process.stdout is not None
        announced: dict[str, Any] = json.loads(self.process.stdout.readline())
        return announced

    def tell(self) -> None:
        """What it waits for."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def exit_status(self) -> int:
        """What it exits with, by itself; its stdin ends."""
        _, errors = self.process.communicate(timeout=LONG)
        sys.stderr.write(errors)
        return self.process.returncode


@contextmanager
def server(
    loop: str, kind: str, death: str, certificate: object = "", phases: Iterable[str] = ()
) -> Iterator[Server]:
    """It ends with the block at the latest."""
    script = Path(__file__).parents[1] / "dying.py"
    with subprocess.Popen(
        [sys.executable, script, loop, kind, death, str(certificate), *phases],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


class PhasePeer(Peer):
    """The other side of a connection in *phase*."""

    def __init__(self, phase: str, port: int, authority: trustme.CA) -> None:
        self.phase = phase
        self.under_way = "under way" in phase
        small = self.under_way or phase in ("sending", "TLS close without room")
        super().__init__(port, buffer=4096 if small else 0)
        self.secure = phase in HANDSHAKES or phase.startswith("TLS")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(context)
        # Apart from the socket, so that it hides nothing of how TCP ends.
        self.received, self.to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.received, self.to_send, server_hostname="localhost"
        )

    def lead(self) -> None:
        """Do the peer's share in getting there."""
        if not self.secure:
            return
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        hello = self.to_send.read()
        if self.phase == "half a ClientHello":
            self.sock.sendall(hello[: len(hello) // 2])
            return
        self.sock.sendall(hello)
        if self.phase == "ClientHello answered":
            assert self.sock.recv(1, socket.MSG_PEEK)
            return
        while True:
            self.received.write(self.sock.recv(65536))
            with suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
                break
        self.sock.sendall(self.to_send.read())

    async def judge(self, *, reset_expected: bool) -> str:
        """What there is to be read, and then what becomes of a writer."""
        seen = await self.read_to_end()
        data, closed = seen.data, [seen.close.value]
        if self.secure:
            data, closed_by_tls = self.decrypt(data)
            closed = closed_by_tls + closed
        if seen.close is PeerClose.FIN:
            poll = select.poll()
            poll.register(self.sock, 0)
            # A reset behind the FIN may be late, but one that is not there always is.
            if poll.poll(LONG * 1000 if reset_expected else 0):
                with pytest.raises(BrokenPipeError):
                    self.sock.send(b"?")
                closed.append("RST")
        return ", ".join([self.measure(data), *closed])

    def decrypt(self, data: bytes) -> tuple[bytes, list[str]]:
        self.received.write(data)
        decrypted = bytearray()
        try:
            self.tls.do_handshake()
            while chunk := self.tls.read():
                decrypted += chunk
        except ssl.SSLError:  # what there is ends without a close_notify
            return bytes(decrypted), []
        return bytes(decrypted), ["close_notify"]

    def measure(self, data: bytes) -> str:
        whole = LONG_ANSWER if self.under_way else WHOLE
        if self.phase == "sending":
            whole = ENDLESS_ANSWER
        if data in NAMES or data == whole:
            return NAMES.get(data, "whole")
        return "a part" if whole.startswith(data) else f"{data[:50]!r}..."


NAMES = {b"": "nothing", HALF: "half"}


def deaths() -> Iterator[Any]:
    """Sudden ones are all the same to a loop; each is tried on one."""
    for case in LOOPS_AND_KINDS:
        for death in ("SIGKILL", *ORDERLY):
            yield pytest.param(*case.values, death, id=f"{case.id}-{death}")
    for death in SUDDEN:
        if death == "SIGKILL":
            continue
        yield pytest.param("asyncio", "native", death, id=f"asyncio-native-{death}")


@pytest.mark.parametrize(("loop", "kind", "death"), list(deaths()))
def test_death_delivers_what_was_earned_and_resets_the_rest(
    loop: str, kind: str, death: str, certificate: Path, authority: trustme.CA
) -> None:
    expected = {phase: ending for phase, (_, ending) in PHASES.items()}
    if death in ORDERLY:
        expected |= READ_WHEN_CUT_SHORT
    if kind != "native":
        # What AnyIO's and Trio's servers accept while they end is in no scope.
        del expected[BACKLOG]

    async def judge(dying: Server) -> dict[str, str]:
        ports = dying.hear()
        with ExitStack() as stack:

            def connect(phase: str) -> PhasePeer:
                peer = PhasePeer(phase, ports[phase], authority)
                stack.enter_context(peer)
                return peer

            peers = {phase: connect(phase) for phase in expected if phase != BACKLOG}
            for peer in peers.values():
                peer.lead()
            for peer in peers.values():
                await arrived(peer)
            dying.tell()
            assert dying.hear() == {phase: PHASES[phase][0] for phase in peers}
            if BACKLOG in expected:
                peers[BACKLOG] = connect(BACKLOG)
            for phase, peer in peers.items():
                if peer.under_way:
                    arrived_so_far = queued(peer.sock.fileno(), termios.FIONREAD)
                    assert 0 < arrived_so_far < len(LONG_ANSWER)
                if phase.endswith("unread input"):
                    await peer.send(b"unread")
                    await arrived(peer)
            dying.tell()
            assert dying.exit_status() == DEATHS[death]
            for phase, peer in peers.items():
                if phase.endswith("input after the death"):
                    await peer.send(b"late")
            return {
                phase: await peers[phase].judge(reset_expected="RST" in ending)
                for phase, ending in expected.items()
            }

    with server(loop, kind, death, certificate, expected) as dying:
        assert anyio.run(judge, dying) == expected


@pytest.mark.parametrize("kind", ["native", "foreign", "trio"])
def test_fin_is_earned_when_it_is_sent(
    kind: str, certificate: Path, authority: trustme.CA
) -> None:
    """Even if it is the last thing that the process does, and has to wait its turn."""
    phase = "drain, answer under way"
    with server("trio", kind, "at the FIN", certificate, [phase]) as dying:
        peer = PhasePeer(phase, dying.hear()[phase], authority)
        with peer:
            assert dying.exit_status() == DEATHS["SIGKILL"]
            seen = anyio.run(partial(peer.judge, reset_expected=False))
    assert seen == PHASES[phase][1]


def judge_forgotten(dying: Server) -> Seen:
    (port,) = dying.hear().values()
    with Peer(port) as peer:
        peer.sock.sendall(REQUEST)
        return anyio.run(peer.read_to_end)


@pytest.mark.parametrize(("loop", "kind"), LOOPS_AND_KINDS)
def test_forgotten_stream_resets(loop: str, kind: str) -> None:
    with server(loop, kind, "forgotten") as living:
        assert judge_forgotten(living) == Seen(HALF, PeerClose.RST)
        assert living.process.poll() is None
        assert living.exit_status() == 0


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_death_without_a_scope_looks_like_a_clean_end(
    loop: str, certificate: Path
) -> None:
    """So the judge can tell, and so there is a need for all this."""
    with server(loop, "plain", "SIGKILL", certificate, ["half sent"]) as dying:
        with Peer(dying.hear()["half sent"]) as peer:
            dying.tell()
            dying.hear()
            dying.tell()
            assert dying.exit_status() == DEATHS["SIGKILL"]
            assert anyio.run(peer.read_to_end) == Seen(HALF, PeerClose.FIN)
