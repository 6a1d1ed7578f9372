"""The clients of the demo, a blocking socket and curl: whether they hear the truth."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from anyio_rst._peer import PeerClose

from ._demo_cases import BUFFER, Way
from ._demo_processes import PATIENCE, NotMeasured, Process, running
from ._demo_servers import LOOPBACK

# The exit statuses of curl for a transfer that was broken off: CURLE_PARTIAL_FILE,
# CURLE_GOT_NOTHING, CURLE_SEND_ERROR and CURLE_RECV_ERROR. Others tell of other things.
BROKEN_OFF = {18, 52, 55, 56}


@dataclass(frozen=True)
class Seen:
    """What a client saw of an answer, and whether that was true; None: not measured."""

    text: str
    true: bool | None


Client = Callable[[Way, Process], Seen]


def is_true(*, claimed: bool, finished: bool, whole: bool) -> bool:
    """Whether a client was told the truth.

    Args:
      claimed: it was told that it has the whole answer.
      finished: the handler finished the answer.
      whole: the client has all of it.
    """
    if claimed:
        return finished and whole
    return not finished


def see_by_socket(way: Way, server: Process) -> Seen:
    """Read to the end, and tell by which kind of end it was.

    Raises:
      NotMeasured: there was none, or not what it was to be the end of.
    """
    data = bytearray()
    close = PeerClose.FIN
    port = int(server.next_line())
    with socket.socket() as sock:
        sock.settimeout(PATIENCE)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        try:
            sock.connect((LOOPBACK, port))
            try:
                sock.sendall(b"request")
                if way.before_reading is not None:
                    way.before_reading(sock, server)
            except (BrokenPipeError, ConnectionResetError):
                # The kernel tells once. What had arrived before can still be read, and
                # then comes an end like any other.
                close = PeerClose.RST
            while chunk := sock.recv(65536):
                data += chunk
        except ConnectionResetError:
            close = PeerClose.RST
        except TimeoutError:
            raise NotMeasured(f"no end within {PATIENCE:g} s") from None
        except OSError as exc:
            raise NotMeasured(str(exc)) from exc
    return judge(way, bytes(data), close.value, claimed=close is PeerClose.FIN)


def see_by_curl(way: Way, server: Process) -> Seen:
    """Download with curl, and tell by its exit status.

    Raises:
      NotMeasured: it tells of something else.
    """
    # --disable: no ~/.curlrc.
    command = ["curl", "--disable", "--silent", "--noproxy", "*"]
    command.append(f"http://{LOOPBACK}:{int(server.next_line())}/")
    with running(command) as curl:
        status, data = curl.rest()
    if status and status not in BROKEN_OFF:
        raise NotMeasured(f"curl: exit {status}")
    return judge(way, data, f"exit {status}", claimed=status == 0)


def judge(way: Way, data: bytes, end: str, *, claimed: bool) -> Seen:
    whole = data == way.answer
    if whole and not way.finishes:
        raise NotMeasured("all of the answer arrived")
    true = is_true(claimed=claimed, finished=way.finishes, whole=whole)
    return Seen(f"{len(data):,}, {end}", true)
