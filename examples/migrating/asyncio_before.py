import asyncio


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        name = await reader.read(65536)
        writer.write(b"Hello, ")
        writer.write(name.decode("ascii").upper().encode())
        await writer.drain()
    finally:
        writer.close()
        await writer.wait_closed()


async def main() -> None:
    async with await asyncio.start_server(greet, port=8000) as server:
        await server.serve_forever()


asyncio.run(main())
