"""Servers in processes of their own: shared ports, signals, limits.

Judged by plain blocking sockets; the processes are serving_process.py and the examples.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_readme import connect, free_port, on

from anyio_rst import PeerClose

from loading import loaded
from serving import LONG, Seen

HERE = Path(__file__).parents[1]
EXAMPLES = HERE.parent / "examples"

Process = subprocess.Popen[str]

loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[Process]:
    """A process that ends with the block at the latest."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, **options
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def server(
    loop: str, mode: str, argument: int, **options: Any
) -> AbstractContextManager[Process]:
    script = str(HERE / "serving_process.py")
    return running([sys.executable, script, loop, mode, str(argument)], **options)


def ports(process: Process) -> list[int]:
    """Printed once the process listens."""
    assert process.stdout is not None
    return [int(port) for port in process.stdout.readline().split()]


def example(name: str, loop: str, **replacements: object) -> list[str]:
    program = on(loop, (EXAMPLES / name).read_text())
    for old, new in replacements.items():
        old = {"port": "8000", "grace": "GRACE = 10.0"}[old]
        assert old in program
        program = program.replace(old, str(new))
    return [sys.executable, "-c", program]


def call(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LONG)


def read_to_end(sock: socket.socket) -> Seen:
    data = b""
    try:
        while chunk := sock.recv(1000):
            data += chunk
    except ConnectionResetError:
        return Seen(data, PeerClose.RST)
    return Seen(data, PeerClose.FIN)


def line(sock: socket.socket) -> str:
    got = b""
    while not got.endswith(b"\n"):
        chunk = sock.recv(1)
        assert chunk, f"FIN after {got!r}"
        got += chunk
    return got.decode().strip()


def finish(sock: socket.socket) -> None:
    """End the connection from this side; the server agrees."""
    with sock:
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock) == Seen(b"", PeerClose.FIN)


def answers(sock: socket.socket, word: bytes) -> None:
    got = b""
    while len(got) < len(word):
        chunk = sock.recv(len(word) - len(got))
        assert chunk, f"FIN after {got!r}"
        got += chunk
    assert got == word


def echoes(sock: socket.socket, word: bytes) -> None:
    sock.sendall(word)
    answers(sock, word)


# Several processes on one port.


@loops
def test_processes_share_the_listening_socket_of_their_parent(loop: str) -> None:
    with ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            descriptor = listener.fileno()
            children: list[Process] = [
                stack.enter_context(
                    server(loop, "inherited", descriptor, pass_fds=[descriptor])
                )
                for _ in range(2)
            ]
            for child in children:
                assert ports(child) == [port]
        # Each serves one at a time, so whoever is not the first is the second.
        first, second = call(port), call(port)
        assert {line(first), line(second)} == {str(child.pid) for child in children}
        finish(second)
        third = call(port)
        line(third)
        finish(third)
        # The end of one of them is none for the others: they have the socket still.
        children[0].kill()
        children[0].wait()
        first.close()
        last = call(port)
        assert line(last) == str(children[1].pid)
        finish(last)


def serve_plainly(listener: socket.socket) -> Seen:
    """What a client gets of a server that knows nothing of all this, and is content."""
    with call(listener.getsockname()[1]) as client:
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"answer")
        return read_to_end(client)


@loops
def test_inherited_listening_socket_stays_what_it_was_to_others(loop: str) -> None:
    """Its options are those of every process that has it, also when ours has gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONG)  # to accept(), O_NONBLOCK makes no difference then
        descriptor = listener.fileno()
        with server(loop, "inherited", descriptor, pass_fds=[descriptor]) as child:
            with call(*ports(child)) as first:
                assert line(first) == str(child.pid)  # and it takes no second
                assert serve_plainly(listener) == Seen(b"answer", PeerClose.FIN)
                child.kill()
                assert read_to_end(first) == Seen(b"", PeerClose.RST)
            child.wait()
        assert serve_plainly(listener) == Seen(b"answer", PeerClose.FIN)


@loops
def test_processes_share_a_port(loop: str) -> None:
    with server(loop, "reuse_port", 0) as one:
        (port,) = ports(one)
        with server(loop, "reuse_port", port) as other:
            assert ports(other) == [port]
            answered: set[str] = set()
            # The kernel distributes them by a hash of the addresses.
            while len(answered) < 2:
                peer = call(port)
                answered.add(line(peer))
                finish(peer)
            assert answered == {str(one.pid), str(other.pid)}


# As systemd does it: the socket is descriptor 3, and the process keeps its number.
ACTIVATE = """
import os, sys
descriptor, *command = sys.argv[1:]
os.dup2(int(descriptor), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(command[0], command)
"""


def activated(listener: socket.socket, loop: str) -> AbstractContextManager[Process]:
    descriptor = listener.fileno()
    command = [sys.executable, "-c", ACTIVATE, str(descriptor)]
    command += example("activated.py", loop)
    return running(command, pass_fds=[descriptor])


@loops
def test_socket_activation(loop: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        early = call(port)  # before there is anybody to serve it
        early.sendall(b"early\n")
        with activated(listener, loop) as process:
            answers(early, b"early\n")
            finish(early)
            half = call(port)
            echoes(half, b"whole\n")
            process.kill()
            with half:
                assert read_to_end(half) == Seen(b"", PeerClose.RST)
        # The socket is systemd's as well: who comes now waits for the next process.
        with call(port) as late, activated(listener, loop):
            echoes(late, b"late\n")


@loops
def test_restarts_by_the_socket_lose_nothing(loop: str) -> None:
    """As `systemctl restart`: the next process starts when the last one has ended."""
    with socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN) as listener:
        with loaded(listener.getsockname()[1]) as load:
            for _ in range(3):
                with activated(listener, loop) as process:
                    load.wait_for(100)
                    process.terminate()
                    _, errors = process.communicate(timeout=LONG)
                    assert (process.returncode, errors) == (0, "")
            with activated(listener, loop):
                load.wait_for(100)
                load.end()
        assert not load.lost


@loops
def test_kill_resets_a_connection_from_before_the_start(loop: str) -> None:
    """It was in the backlog of a socket that nobody had armed yet."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = listener.fileno()
        early = call(listener.getsockname()[1])
        with early, server(loop, "inherited", descriptor, pass_fds=[descriptor]) as child:
            assert line(early) == str(child.pid)
            child.kill()
            assert read_to_end(early) == Seen(b"", PeerClose.RST)


def test_activated_example_says_when_nobody_activated_it() -> None:
    with running(example("activated.py", "asyncio")) as process:
        _, errors = process.communicate(timeout=LONG)
    assert (process.returncode, errors) == (1, "not started by systemd\n")


# The graceful end.


def stop(process: Process) -> None:
    """Until SIGCONT the process does nothing, and the kernel goes on for it."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


@loops
def test_sigterm_loses_no_answer(loop: str) -> None:
    port = free_port()
    with running(example("graceful.py", loop, port=port)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"serving on {port}\n"
        accepted = [call(port) for _ in range(5)]
        for peer in accepted:
            echoes(peer, b"before")
        stop(process)
        for peer in accepted:
            peer.sendall(b"during")
        waiting = [call(port) for _ in range(20)]
        for peer in waiting:
            peer.sendall(b"late")
            peer.shutdown(socket.SHUT_WR)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        for peer in waiting:
            with peer:
                assert read_to_end(peer) == Seen(b"late", PeerClose.FIN)
        for peer in accepted:
            answers(peer, b"during")
            echoes(peer, b"after")
            finish(peer)
        _, errors = process.communicate(timeout=LONG)
    assert (process.returncode, errors) == (0, "")


@loops
def test_sigterm_under_load_ends_nothing_in_silence(loop: str) -> None:
    """Clients who come all the time: each is answered, reset or refused."""
    port = free_port()
    seen: list[Seen] = []
    answered = threading.Event()

    def come_again() -> None:
        while True:
            try:
                peer = call(port)
            except OSError:
                return
            with peer:
                try:
                    peer.sendall(b"word")
                    peer.shutdown(socket.SHUT_WR)
                    seen.append(read_to_end(peer))
                except OSError:
                    seen.append(Seen(b"", PeerClose.RST))
            if len(seen) > 100:
                answered.set()

    with running(example("graceful.py", loop, port=port)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"serving on {port}\n"
        clients = [threading.Thread(target=come_again) for _ in range(4)]
        for client in clients:
            client.start()
        assert answered.wait(LONG)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(LONG)
        _, errors = process.communicate(timeout=LONG)
    assert (process.returncode, errors) == (0, "")
    assert len(seen) > 100
    for one in seen:
        assert one.close is PeerClose.RST or one == Seen(b"word", PeerClose.FIN)


@loops
def test_deadline_after_sigterm_resets_the_rest(loop: str) -> None:
    port = free_port()
    program = example("graceful.py", loop, port=port, grace="GRACE = 0.2")
    with running(program) as process, connect(port, process) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        _, errors = process.communicate(timeout=LONG)
    assert (process.returncode, errors) == (0, "")


# Out of descriptors.


def line_and_finish(peer: socket.socket) -> str:
    number = line(peer)
    finish(peer)
    return number


@loops
def test_everybody_is_served_in_the_end_without_descriptors(loop: str) -> None:
    with server(loop, "few descriptors", 48) as process:
        assert process.stderr is not None
        one, other = ports(process)
        peers = [call(port) for _ in range(75) for port in (one, other)]
        lines = [process.stderr.readline() for _ in range(3)]  # the limit is reached
        with ThreadPoolExecutor(len(peers)) as clients:
            served = list(clients.map(line_and_finish, peers))
        assert served == [str(process.pid)] * len(peers)
        process.terminate()
        _, rest = process.communicate(timeout=LONG)
    lines += [text for text in rest.splitlines() if "accept" in text]
    for text in lines:
        assert "ERROR accept: EMFILE (Too many open files); trying again" in text
    times = [float(text.split()[0]) for text in lines]
    assert len(times) <= (times[-1] - times[0]) / 0.1 + 2
