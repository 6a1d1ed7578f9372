"""An ASGI server that does not show its connections (hypercorn), with truthful endings.

hypercorn -k trio asgi_hypercorn:app
curl --http1.0 http://localhost:8000/-500/500
"""

import os
import socket
import stat
from contextlib import suppress
from typing import Any

from anyio_rst import lowlevel

from asgi_table import table


def reset_by_address(app: Any) -> Any:
    """Reset the connection of an unfinished answer."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["http_version"] not in ("1.0", "1.1"):
            await app(scope, receive, send)  # they mark their own ends
            return
        server, client = scope.get("server"), scope.get("client")
        begun = done = False

        async def send_watched(message: Any) -> None:
            nonlocal begun, done
            is_last = begun and not message.get("more_body", False)
            begun = True
            await send(message)
            done = is_last

        try:
            await app(scope, receive, send_watched)
        finally:
            if begun and not done and server and client:  # a UNIX socket has none
                reset(tuple(server), tuple(client))

    return serve


def reset(server: tuple[str, int], client: tuple[str, int]) -> None:
    """Look for the connection among the open descriptors of this process."""
    for descriptor in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # it is closed by now, or not connected
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                blocks = os.get_blocking(descriptor)
                with socket.socket(fileno=os.dup(descriptor)) as sock:
                    os.set_blocking(descriptor, blocks)  # PyPy has made it block
                    ends = sock.getsockname()[:2], sock.getpeername()[:2]
                    if ends == (server, client):
                        lowlevel.reset(sock)


app = reset_by_address(table)
