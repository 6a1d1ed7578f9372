"""An aiohttp server with truthful endings.

python examples/aiohttp_server.py 8000
curl --http1.0 http://localhost:8000/-500/500
"""

import sys
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web
from aiohttp.typedefs import Handler

from anyio_rst import lowlevel


@web.middleware
async def true_endings(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware: list it first."""
    connection = request.transport
    tell(lowlevel.arm, connection)
    try:
        response = await handler(request)
        await response.prepare(request)
        await response.write_eof()
    except BaseException:
        if "has begun" in request:
            tell(lowlevel.reset, connection)
        raise
    finally:
        tell(lowlevel.disarm, connection)
    return response


def tell(do: Callable[[object], None], connection: object) -> None:
    with suppress(TypeError, ValueError, OSError):  # a UNIX socket, or already closed
        do(connection)


async def note(request: web.Request, response: web.StreamResponse) -> None:
    request["has begun"] = True


async def table(request: web.Request) -> web.StreamResponse:
    """A table of 1/n, which fails half way if n becomes 0."""
    response = web.StreamResponse()
    await response.prepare(request)
    first, last = int(request.match_info["first"]), int(request.match_info["last"])
    for n in range(first, last + 1):
        await response.write(b"%d %.6f\n" % (n, 1 / n))
    return response


app = web.Application(middlewares=[true_endings])
app.on_response_prepare.append(note)
app.router.add_get("/{first}/{last}", table)

if __name__ == "__main__":
    web.run_app(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
