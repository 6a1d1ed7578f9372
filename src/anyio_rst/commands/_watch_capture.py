"""All TCP segments of this machine, through a packet socket: packet(7), Linux only.

The kernel copies the headers into a ring that is shared with it, and stamps them with the
time (Documentation/networking/packet_mmap.rst). So a whole packet takes no more room than
its headers, and the privilege to have a large socket buffer is not needed.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING

from anyio_rst.testing._capture import (
    ETH_P_ALL,
    INSTRUCTION,
    JUMP_IF_EQUAL,
    LOAD_BYTE,
    LOAD_HALF_INDEXED,
    LOAD_INDEX,
    PACKET_OUTGOING,
    PACKET_STATISTICS,
    RETURN,
    SOL_PACKET,
    attach_filter,
)

from ._watch_segments import AUTHENTICATION as AUTHENTICATION_HEADER
from ._watch_segments import EXTENSIONS, IPV4, IPV6, TCP, VLANS
from ._watch_segments import FRAGMENT as FRAGMENT_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# linux/if_packet.h
PACKET_OTHERHOST = 3
PACKET_RX_RING = 5
PACKET_VERSION = 10
TPACKET_V2 = 1
TP_STATUS_KERNEL, TP_STATUS_USER = 0, 1

# struct tpacket2_hdr, and behind it the protocol of struct sockaddr_ll: status, lengths
# on the wire and in the frame, where the IP header is, seconds, nanoseconds, protocol.
FRAME = struct.Struct("=IIIxxHII10xH")
STATUS = struct.Struct("=I")

# Bytes of a frame: 80 of them, and the headers of a packet, with most of their options.
FRAME_SIZE = 256
BLOCK_SIZE = 2**16
BLOCKS = 512  # 32 MiB in all: the headers of 131,072 packets
FRAMES = BLOCKS * BLOCK_SIZE // FRAME_SIZE

# linux/if_arp.h
ARPHRD_LOOPBACK = 772


class Unavailable(Exception):
    """This process cannot capture; the message says why."""


class NotPermitted(Unavailable):
    """It lacks CAP_NET_RAW: capabilities(7)."""


class Capture:
    """From now on.

    Args:
      interface: its name; None for all.
      ports: one of which each packet is from or to; empty for all.

    Raises:
      Unavailable: see there.
    """

    def __init__(self, interface: str | None, ports: Sequence[int]) -> None:
        if not hasattr(socket, "AF_PACKET"):
            raise Unavailable("capturing packets needs Linux")
        # With a protocol it gets the packets of all interfaces, and at once. What came
        # before there was a filter goes when the ring comes, and is not to be counted.
        protocol = 0 if interface else socket.htons(ETH_P_ALL)
        try:
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, protocol)
        except OSError as exc:
            if exc.errno in (errno.EPERM, errno.EACCES):
                raise NotPermitted("capturing packets needs CAP_NET_RAW") from exc
            raise Unavailable(f"cannot open a packet socket: {exc.strerror}") from exc
        self._next = 0
        try:
            attach_filter(self._sock, assembled(ports))
            self._sock.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
            # struct tpacket_req: blocks and frames, size and number of each
            request = struct.pack("IIII", BLOCK_SIZE, BLOCKS, FRAME_SIZE, FRAMES)
            self._sock.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
            self._ring = mmap.mmap(self._sock.fileno(), BLOCKS * BLOCK_SIZE)
            if interface:
                self._sock.bind((interface, ETH_P_ALL))
            self.lost()
        except OSError as exc:
            self._sock.close()
            if exc.errno == errno.ENODEV:
                raise Unavailable(f"there is no interface {interface!r}") from exc
            raise Unavailable(f"cannot capture: {exc.strerror}") from exc

    def close(self) -> None:
        self._ring.close()
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def packets(self) -> Iterator[tuple[float, bytes, int, bool]]:
        """What has come, a ring of it at most.

        Returns:
          When, in seconds since the epoch; the first bytes, from the IP header, or a
          VLAN tag, on; how many they were on the wire; whether there may be a tag.
        """
        ring, number, ip = (
            self._ring,
            self._next,
            (socket.htons(IPV4), socket.htons(IPV6)),
        )
        for _ in range(FRAMES):
            at = number * FRAME_SIZE
            status, size, kept, start, seconds, nanoseconds, protocol = FRAME.unpack_from(
                ring, at
            )
            if not status & TP_STATUS_USER:
                break
            start += at
            packet = ring[start : start + kept]
            STATUS.pack_into(ring, at, TP_STATUS_KERNEL)
            number = self._next = (number + 1) % FRAMES
            yield seconds + nanoseconds / 1e9, packet, size, protocol not in ip

    def lost(self) -> int:
        """Packets for which there was no room, since the last call."""
        statistics = self._sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        lost: int = struct.unpack("II", statistics)[1]
        return lost

    def error(self) -> str | None:
        """What is wrong with the interface."""
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return os.strerror(number) if number else None


# The filter, so that no other packet takes any time.

# linux/bpf_common.h
LOAD_WORD = 0x20
LOAD_HALF = 0x28
LOAD_INDEX_IMMEDIATE = 0x01
JUMP = 0x05
JUMP_IF_ANY = 0x45  # of these bits

# What the kernel knows of a packet: linux/filter.h
SKF_AD_OFF = 2**32 - 0x1000
PROTOCOL, PACKET_TYPE, HARDWARE = SKF_AD_OFF, SKF_AD_OFF + 4, SKF_AD_OFF + 28

WHOLE = 2**18


# Code, operand, where to jump if true and if false; None: to the next one.
Instruction = tuple[int, int] | tuple[int, int, str | None, str | None]


def assembled(ports: Sequence[int]) -> bytes:
    """Keep TCP, IPv4 and IPv6; where that takes more to tell, keep it too."""
    extensions = sorted({*EXTENSIONS, FRAGMENT_HEADER, AUTHENTICATION_HEADER})
    found: list[Instruction] = [(JUMP_IF_EQUAL, port, "keep", None) for port in ports]
    otherwise = "drop" if ports else "keep"
    instructions: list[Instruction | str] = [
        (LOAD_WORD, PACKET_TYPE),
        # To another machine: somebody has asked the interface for all there is.
        (JUMP_IF_EQUAL, PACKET_OTHERHOST, "drop", None),
        # Loopback shows each packet twice, as outgoing and as incoming.
        (JUMP_IF_EQUAL, PACKET_OUTGOING, "once", None),
        (LOAD_WORD, HARDWARE),
        (JUMP_IF_EQUAL, ARPHRD_LOOPBACK, "drop", None),
        "once",
        (LOAD_WORD, PROTOCOL),
        *((JUMP_IF_EQUAL, tag, "keep", None) for tag in sorted(VLANS)),
        (JUMP_IF_EQUAL, IPV6, "ipv6", None),
        (JUMP_IF_EQUAL, IPV4, None, "drop"),
        (LOAD_BYTE, 9),
        (JUMP_IF_EQUAL, TCP, None, "drop"),
        (LOAD_HALF, 6),
        (JUMP_IF_ANY, 0x1FFF, "drop", None),  # a fragment without the TCP header
        (LOAD_INDEX, 0),
        (JUMP_IF_EQUAL, 0, "ports", "ports"),
        "ipv6",
        (LOAD_BYTE, 6),
        *((JUMP_IF_EQUAL, header, "keep", None) for header in extensions),
        (JUMP_IF_EQUAL, TCP, None, "drop"),
        (LOAD_INDEX_IMMEDIATE, 40),
        "ports",
        (LOAD_HALF_INDEXED, 0),
        *found,
        (LOAD_HALF_INDEXED, 2),
        *found,
        (JUMP_IF_EQUAL, 0, otherwise, otherwise),
        "drop",
        (RETURN, 0),
        "keep",
        (RETURN, WHOLE),
    ]
    places: dict[str, int] = {}
    at = 0
    for each in instructions:
        if isinstance(each, str):
            places[each] = at
        else:
            at += 1
    program = b""
    at = 0
    for each in instructions:
        if isinstance(each, str):
            continue
        at += 1
        code, operand, *targets = each
        # A jump counts from the instruction that follows.
        jumps = [places[target] - at if target else 0 for target in targets] or [0, 0]
        program += INSTRUCTION.pack(code, *jumps, operand)
    return program
