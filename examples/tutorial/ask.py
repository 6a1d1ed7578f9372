"""A client with a plain socket: send lines, print the answer and how it ended."""

import contextlib
import socket
import sys

lines = sys.argv[1:]
with socket.create_connection(("127.0.0.1", 8000)) as sock:
    sock.sendall("".join(f"{line}\n" for line in lines if line != "...").encode())
    if "..." not in lines:  # the client is not done yet
        with contextlib.suppress(OSError):  # the server may have reset it already
            sock.shutdown(socket.SHUT_WR)  # FIN: that was all
    try:
        while chunk := sock.recv(1000):
            print(chunk.decode(), end="", flush=True)
        print("FIN")
    except ConnectionResetError:
        print("RST")
