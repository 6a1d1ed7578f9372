"""An echo server that logs a line of JSON for each connection that has ended.

python examples/log_json.py 8000
"""

import json
import logging
import sys
from datetime import datetime, timezone
from functools import partial

import anyio

from anyio_rst import Connection, serve_tcp

logger = logging.getLogger("echo")


class JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        # In ASCII, so that no data of a peer can end the line.
        return json.dumps(entry, default=str)


def log_ending(conn: Connection) -> None:
    assert conn.ending is not None
    fields = {"ending": conn.ending.as_dict(), **vars(conn.state)}
    logger.info("a connection has ended", extra={"fields": fields})


async def echo(conn: Connection) -> None:
    conn.state.chunks = 0
    async for chunk in conn:
        await conn.send(chunk)
        conn.state.chunks += 1


if __name__ == "__main__":
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    anyio.run(partial(serve_tcp, echo, port, on_ending=log_ending))
