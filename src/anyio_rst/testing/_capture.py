"""The TCP segments of a port, as they pass over loopback: packet(7), Linux only."""

from __future__ import annotations

import ctypes
import enum
import errno
import socket
import struct
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERFACE = "lo"

# From linux/if_ether.h, linux/if_packet.h and asm-generic/socket.h; the socket module
# does not have all of them in each version.
ETH_P_ALL = 3
PACKET_OUTGOING = 4
PACKET_STATISTICS = 6
SOL_PACKET = 263
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33

# Bytes of a packet to keep: both headers, with all of their options.
HEADERS = 120

# The kernel counts whole packets, of up to 64 KB on loopback, until they are read.
BUFFER = 2**25


class CaptureUnavailable(RuntimeError):
    """This process cannot capture segments; the message says what it lacks."""


class TCPFlag(enum.Flag):
    """The control bits of a segment (RFC 9293, 3.1)."""

    FIN = 0x01
    SYN = 0x02
    RST = 0x04
    PSH = 0x08
    ACK = 0x10
    URG = 0x20
    ECE = 0x40
    CWR = 0x80


class Direction(enum.Enum):
    """Where a segment went, seen from the captured port."""

    FROM_PORT = "from the port"
    TO_PORT = "to the port"


@dataclass(frozen=True)
class Segment:
    """One TCP segment, as loopback carried it: up to 64 KB, not yet split."""

    direction: Direction
    """From the port that was asked for, or to it."""

    other_port: int
    """The port at the other end, which tells connections apart."""

    flags: TCPFlag
    """The control bits."""

    sequence: int
    """The sequence number, modulo 2**32, of the first byte (or of the SYN or FIN)."""

    length: int
    """Bytes of data."""


class Capture:
    """The segments of a :func:`capture_segments`."""

    def __init__(self, port: int, sock: socket.socket) -> None:
        self._port = port
        self._sock = sock
        self._segments: list[Segment] = []
        self._lost = 0

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments up to now, in order. Readable after the block, too.

        Raises:
          RuntimeError: some were lost, because they were not read early enough.
        """
        self._collect()
        return tuple(self._segments)

    def having(self, flags: TCPFlag) -> tuple[Segment, ...]:
        """The :attr:`segments` that have all of *flags*."""
        return tuple(segment for segment in self.segments if flags in segment.flags)

    def _collect(self) -> None:
        while self._sock.fileno() != -1:
            try:
                packet, address = self._sock.recvfrom(HEADERS)
            except BlockingIOError:
                statistics = self._sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
                self._lost += struct.unpack("II", statistics)[1]  # since the last call
                break
            # Loopback shows each packet twice, as outgoing and as incoming.
            if address[2] == PACKET_OUTGOING:
                self._segments.append(_parsed(packet, self._port))
        if self._lost:
            raise RuntimeError(f"{self._lost} segments were lost: read them earlier")


@contextmanager
def capture_segments(port: int) -> Iterator[Capture]:
    """Capture what is sent from or to *port* over loopback, IPv4 and IPv6.

    ::

        with capture_segments(server.port) as capture:
            ...
        assert not capture.having(TCPFlag.RST)

    A segment is captured as soon as it has been sent. Works with and without an event
    loop. Needs Linux and CAP_NET_RAW (capabilities(7)), which root usually has.

    Raises:
      CaptureUnavailable: the process is not allowed to, or the platform cannot.
    """
    with open_packet_socket() as sock:
        attach_filter(sock, _filter(port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        with suppress(OSError):  # beyond net.core.rmem_max only with CAP_NET_ADMIN
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        sock.bind((INTERFACE, ETH_P_ALL))  # and not before: it captures from here on
        capture = Capture(port, sock)
        try:
            yield capture
        except BaseException:
            with suppress(RuntimeError):
                capture._collect()
            raise
        capture._collect()


def open_packet_socket() -> socket.socket:
    """A packet socket that captures nothing yet.

    Raises:
      CaptureUnavailable: see :func:`capture_segments`.
    """
    if not hasattr(socket, "AF_PACKET"):
        raise CaptureUnavailable("capturing segments needs packet sockets: Linux only")
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES):
            raise CaptureUnavailable("capturing segments needs CAP_NET_RAW") from exc
        raise CaptureUnavailable(f"no packet socket is to be had: {exc}") from exc
    sock.setblocking(False)
    return sock


def attach_filter(sock: socket.socket, program: bytes) -> None:
    """Let *sock* have what *program*, made of :data:`INSTRUCTION`, keeps."""
    code = ctypes.create_string_buffer(program)
    count = len(program) // INSTRUCTION.size
    # struct sock_fprog (linux/filter.h)
    pointer = struct.pack("HP", count, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, pointer)


def _parsed(packet: bytes, port: int) -> Segment:
    if packet[0] >> 4 == 4:
        start = (packet[0] & 0x0F) * 4  # RFC 791, 3.1
        size: int = struct.unpack_from("!H", packet, 2)[0]
    else:
        start = 40  # RFC 8200, 3
        size = start + struct.unpack_from("!H", packet, 4)[0]
    source, target, sequence, _, offset, flags = struct.unpack_from(
        "!HHIIBB", packet, start
    )
    outward = source == port
    return Segment(
        direction=Direction.FROM_PORT if outward else Direction.TO_PORT,
        other_port=target if outward else source,
        flags=TCPFlag(flags),
        sequence=sequence,
        length=size - start - (offset >> 4) * 4,
    )


# struct sock_filter: code, jump if true, jump if false, operand (linux/filter.h).
INSTRUCTION = struct.Struct("HBBI")

# Its codes (linux/bpf_common.h).
LOAD_BYTE = 0x30
LOAD_HALF = 0x28
LOAD_HALF_INDEXED = 0x48
LOAD_INDEX = 0xB1  # X = 4 * (packet[k] & 15): the length of an IPv4 header
AND = 0x54
JUMP_IF_EQUAL = 0x15
RETURN = 0x06


def _filter(port: int) -> bytes:
    """Keep the TCP segments of *port*, so that nothing else fills the buffer."""
    keep, drop = 16, 17
    instructions = [
        (LOAD_BYTE, 0),
        (AND, 0xF0),
        (JUMP_IF_EQUAL, 0x40, 3, 10),  # IPv4, or else IPv6
        (LOAD_BYTE, 9),
        (JUMP_IF_EQUAL, socket.IPPROTO_TCP, 5, drop),
        (LOAD_INDEX, 0),
        (LOAD_HALF_INDEXED, 0),  # source port
        (JUMP_IF_EQUAL, port, keep, 8),
        (LOAD_HALF_INDEXED, 2),  # destination port
        (JUMP_IF_EQUAL, port, keep, drop),
        (LOAD_BYTE, 6),
        (JUMP_IF_EQUAL, socket.IPPROTO_TCP, 12, drop),
        (LOAD_HALF, 40),
        (JUMP_IF_EQUAL, port, keep, 14),
        (LOAD_HALF, 42),
        (JUMP_IF_EQUAL, port, keep, drop),
        (RETURN, HEADERS),
        (RETURN, 0),
    ]
    program = b""
    for index, (code, operand, *targets) in enumerate(instructions):
        # A jump counts from the instruction that follows.
        jumps = [target - index - 1 for target in targets] or [0, 0]
        program += INSTRUCTION.pack(code, *jumps, operand)
    return program
