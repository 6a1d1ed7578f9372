"""What may stand on the command line, and what to type instead."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError

# The longest time that can be asked for, in seconds.
DAY = 86400.0

# IFNAMSIZ of linux/if.h, which counts the null byte at the end.
LONGEST_INTERFACE = 15

URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?:[^/?#]*@)?(?P<authority>[^/?#]*)")
AUTHORITY = re.compile(r"(?P<host>\[[^][]*\]|[^:]*)(?::(?P<port>\d*))?")

# What a URL of these says, apart from the host.
SCHEMES = {"http": "80", "https": "443 --tls"}


def host_name(text: str) -> str:
    """A name or an address, without the brackets of one in a URL.

    Raises:
      ArgumentTypeError: it is empty, or more than that; the message says what to type.
    """
    if url := URL.match(text):
        text, rest = url["authority"], SCHEMES.get(url["scheme"].lower(), "PORT")
        found = AUTHORITY.fullmatch(text)
        if found and found["host"]:
            if found["port"]:
                rest = " ".join([found["port"], *rest.split()[1:]])
            raise ArgumentTypeError(f"is not a URL: type {found['host']} {rest}")
        raise ArgumentTypeError("is not a URL")
    found = AUTHORITY.fullmatch(text)
    if found and found["host"] and found["port"] is not None:
        port = found["port"] or "PORT"
        raise ArgumentTypeError(f"and PORT are two words: type {found['host']} {port}")
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not host:
        raise ArgumentTypeError("must not be empty")
    return host


def port_number(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise ArgumentTypeError(f"must be a number from 1 to 65535, not {text!r}")
    return port


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= DAY:
        raise ArgumentTypeError(
            f"must be seconds, more than 0 and at most a day, not {text!r}"
        )
    return number


def interface_name(text: str) -> str:
    if not 0 < len(text.encode(errors="surrogateescape")) <= LONGEST_INTERFACE:
        raise ArgumentTypeError(f"must be 1 to {LONGEST_INTERFACE} bytes long")
    return text
