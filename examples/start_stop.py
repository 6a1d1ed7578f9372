"""An object that owns a connection from its start to its stop.

$ python examples/line_protocol.py &
$ python examples/start_stop.py
"""

import anyio

from anyio_rst import Connection, connect_tcp, connection_scope


class Client:
    _conn: Connection

    async def start(self, host: str, port: int) -> None:
        self._conn = await connect_tcp(host, port)
        async with connection_scope(self._conn) as scope:  # if the start fails: RST
            greeting = await scope.receive()
            if not greeting.startswith(b"+OK"):
                raise ConnectionRefusedError(greeting.decode("ascii", "replace"))
            scope.detach()

    async def stop(self) -> None:
        await self._conn.aclose()  # FIN, or RST in a cancelled scope

    def give_up(self) -> None:
        self._conn.abort()  # RST


async def main() -> None:
    client = Client()
    await client.start("localhost", 8000)
    await client.stop()


if __name__ == "__main__":
    anyio.run(main)
