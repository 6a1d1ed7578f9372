"""An ASGI middleware: an unfinished answer ends with RST instead of FIN."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from anyio_rst import lowlevel


def true_endings(app: Any, connection: Callable[[], object]) -> Any:
    """*connection()*, called in the task of a request, returns its TCP connection."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        # HTTP/2 and WebSocket mark their own ends.
        done = scope["type"] != "http" or scope["http_version"] not in ("1.0", "1.1")
        begun = False

        def tell(do: Callable[[object], None]) -> None:
            with suppress(TypeError, ValueError, OSError):  # a UNIX socket, or closed
                do(connection())

        async def send_armed(message: Any) -> None:
            nonlocal begun, done
            if not (begun or done):  # this is http.response.start
                begun = True
                tell(lowlevel.arm)
            elif not (done or message.get("more_body", False)):
                await send({**message, "more_body": True})
                tell(lowlevel.disarm)  # all is sent but the mark of its end
                message = {"type": "http.response.body"}
                done = True
            await send(message)

        try:
            await app(scope, receive, send_armed)
        finally:
            if begun and not done:  # it raised, was cancelled, or forgot the rest
                tell(lowlevel.reset)

    return serve
