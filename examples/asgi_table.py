"""An ASGI application as one writes it, which knows nothing of endings.

/1/1000 is a table of 1/n, all of it; /-500/500 fails half way, where n is 0.
"""

from typing import Any

HEADERS = [(b"content-type", b"text/plain")]


async def table(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise NotImplementedError  # of a lifespan: it has none
    first, last = map(int, scope["path"].strip("/").split("/"))
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    for n in range(first, last + 1):
        line = b"%d %.6f\n" % (n, 1 / n)
        await send({"type": "http.response.body", "body": line, "more_body": True})
    await send({"type": "http.response.body"})
