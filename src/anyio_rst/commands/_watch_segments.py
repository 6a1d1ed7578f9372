"""What a captured packet says of TCP: pure functions over bytes that anybody sent."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

# Control bits (RFC 9293, 3.1).
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

# Ethertypes (linux/if_ether.h).
IPV4, IPV6 = 0x0800, 0x86DD
VLANS = {0x8100, 0x88A8}

TCP = 6

# IPv6 extension headers that may precede TCP, in units of eight octets: RFC 8200, 4.
# HOPOPTS, ROUTING, DSTOPTS, and MH, HIP, SHIM6 of RFC 7045.
EXTENSIONS = frozenset({0, 43, 60, 135, 139, 140})
FRAGMENT = 44
AUTHENTICATION = 51  # in units of four: RFC 4302, 2.2

# Source and target port, sequence and acknowledgment number, data offset, control bits.
_TCP = struct.Struct("!4sIIBB")
_SHORT = struct.Struct("!H")


class Unreadable(Exception):
    """It should be a TCP segment, but its headers are cut short, or nonsense."""


class Segment(NamedTuple):
    """One TCP segment; fast to make, since there may be many."""

    way: bytes
    """Source and target address, source and target port: as packed in the headers."""

    flags: int
    sequence: int
    acknowledgment: int

    length: int
    """Bytes of data."""

    ttl: int
    """How many routers it might still pass (IPv6: hop limit)."""


class Endpoint(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse(packet: bytes, size: int, *, tagged: bool = False) -> Segment | None:
    """What *packet*, the first bytes of one that has *size* on the wire, is of TCP.

    Args:
      tagged: it may begin with VLAN tags (IEEE 802.1Q), without what precedes them.

    Returns:
      None for another protocol, and for a fragment without the TCP header.

    Raises:
      Unreadable: the headers are cut short, or contradict each other.
    """
    try:
        if tagged:
            tags = _tags(packet)
            packet, size = packet[tags:], size - tags
        version = packet[0] >> 4
        if version == 4:
            return _parse_ipv4(packet, size)
        if version == 6:
            return _parse_ipv6(packet, size)
    except (IndexError, struct.error):
        raise Unreadable from None
    return None


def _tags(packet: bytes) -> int:
    """How many bytes of VLAN tags there are.

    Of what this machine sends, the kernel shows the IP header, even if it has put a tag
    before it, and says only that there is one.
    """
    at = 0
    while True:
        (kind,) = _SHORT.unpack_from(packet, at + 2)
        if kind in VLANS:
            at += 4
        elif kind in (IPV4, IPV6) and packet[at + 4] >> 4 == (4 if kind == IPV4 else 6):
            return at + 4
        else:
            return 0


def _parse_ipv4(packet: bytes, size: int) -> Segment | None:
    # RFC 791, 3.1
    start = (packet[0] & 0x0F) * 4
    (fragment,) = _SHORT.unpack_from(packet, 6)
    if packet[9] != TCP or fragment & 0x1FFF:
        return None
    if start < 20:
        raise Unreadable
    (total,) = _SHORT.unpack_from(packet, 2)
    # 0: too long for this field, in which a network interface cuts it (BIG TCP).
    end = min(total, size) if total else size
    return _parse_tcp(packet, start, end, packet[12:20], packet[8])


def _parse_ipv6(packet: bytes, size: int) -> Segment | None:
    # RFC 8200, 3
    (payload,) = _SHORT.unpack_from(packet, 4)
    end = min(40 + payload, size) if payload else size  # 0: as above, or RFC 2675
    header, start = packet[6], 40
    while header != TCP:
        if header in EXTENSIONS:
            length = (packet[start + 1] + 1) * 8
        elif header == FRAGMENT:
            if _SHORT.unpack_from(packet, start + 2)[0] >> 3:
                return None
            length = 8
        elif header == AUTHENTICATION:
            length = (packet[start + 1] + 2) * 4
        else:
            return None
        header = packet[start]
        start += length
    return _parse_tcp(packet, start, end, packet[8:40], packet[7])


def _parse_tcp(
    packet: bytes, start: int, end: int, addresses: bytes, ttl: int
) -> Segment:
    ports, sequence, acknowledgment, offset, flags = _TCP.unpack_from(packet, start)
    header = (offset >> 4) * 4
    length = end - start - header
    if header < 20 or length < 0:
        raise Unreadable
    return Segment(addresses + ports, flags, sequence, acknowledgment, length, ttl)


def reverse(way: bytes) -> bytes:
    """The way of the answers."""
    size = (len(way) - 4) // 2
    addresses, ports = way[:-4], way[-4:]
    return addresses[size:] + addresses[:size] + ports[2:] + ports[:2]


def source_port(way: bytes) -> int:
    port: int = _SHORT.unpack_from(way, len(way) - 4)[0]
    return port


def target_port(way: bytes) -> int:
    port: int = _SHORT.unpack_from(way, len(way) - 2)[0]
    return port


def source(way: bytes) -> Endpoint:
    size = (len(way) - 4) // 2
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    return Endpoint(socket.inet_ntop(family, way[:size]), source_port(way))
