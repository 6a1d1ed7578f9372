"""uvicorn with truthful endings.

python examples/asgi_uvicorn.py 8000
curl --http1.0 http://localhost:8000/-500/500
"""

import asyncio
import sys
from contextvars import ContextVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from asgi import true_endings
from asgi_table import table

CONNECTION: ContextVar[object] = ContextVar("CONNECTION")


class Known(asyncio.Protocol):
    """Lets the tasks of requests find their connection in the context."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connection = transport
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        CONNECTION.set(self.connection)
        super().data_received(data)


class Http(Known, H11Protocol):  # or HttpToolsProtocol
    pass


app = true_endings(table, CONNECTION.get)

if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    uvicorn.run(app, port=port, http=Http)
