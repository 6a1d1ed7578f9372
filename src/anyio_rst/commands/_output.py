"""What the commands print, also where nothing takes it."""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import shutil
import sys
import textwrap
from importlib.metadata import version
from typing import IO, TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# Columns of the narrowest terminal to be expected.
WIDTH = 80

# The exit status of a command line that cannot be run, as argparse has it.
USAGE = 2

# EX_IOERR of sysexits.h.
NOT_WRITTEN = 74

# 128 + SIGPIPE: what a shell says of a program that SIGPIPE killed. Python ignores that.
NOT_READ = 141

# Seconds for who reads to go on reading, when an interruption finds that it does not.
PATIENCE = 1.0


class Unwritable(Exception):
    """The standard output does not take what a command prints."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.status = NOT_READ if number == errno.EPIPE else NOT_WRITTEN


def put(text: str) -> None:
    """Print on the standard output, now.

    Raises:
      Unwritable: it is full, or closed on either side.
    """
    if sys.stdout is None:  # it was closed when Python started
        raise Unwritable(errno.EBADF)
    try:
        print(text, flush=True)
    except OSError as exc:
        discard(sys.stdout)
        raise Unwritable(exc.errno or errno.EIO) from exc
    except BaseException:
        discard(sys.stdout)  # Ctrl-C in it: who reads may have stopped reading
        raise


def complain(line: str) -> None:
    """Print on the standard error, if it takes that."""
    if sys.stderr is None:  # print() would take the standard output instead
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Forget what *stream* holds.

    Python would write it when it exits, and fail again: docs.python.org, "Note on
    SIGPIPE" of :mod:`signal`.
    """
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())


def is_stuck() -> bool:
    """Whether nobody takes what is on its way to the standard output."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except io.UnsupportedOperation:  # it is in memory
        return False
    return not poll.poll(PATIENCE * 1000)


class Parser(argparse.ArgumentParser):
    """One that does not take for printed what was not."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, **options)
        # Python 3.14 colours what goes to a file, if the other output is a terminal.
        self.color = False

    def format_help(self) -> str:
        self.description = paragraphs(self.description)
        self.epilog = paragraphs(self.epilog)
        return super().format_help()

    def print_help(self, file: SupportsWrite[str] | IO[str] | None = None) -> None:
        put(self.format_help().rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        complain(f"{self.format_usage()}{self.prog}: error: {message}")
        sys.exit(USAGE)


def paragraphs(text: str | None) -> str | None:
    """Let *text* fit the terminal, apart from lines that are indented: examples."""
    if text is None:
        return None
    width = shutil.get_terminal_size().columns - 2  # as argparse has it
    return "\n\n".join(
        part if part.startswith("    ") else textwrap.fill(" ".join(part.split()), width)
        for part in text.strip("\n").split("\n\n")
    )


class Version(argparse.Action):
    """`--version`, printed as the help is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, help="show the version, and exit", **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        put(f"{parser.prog} {version('anyio_rst')}")
        parser.exit()
