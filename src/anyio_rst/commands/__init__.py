"""What the command `anyio-rst` can do: each module is one of its commands.

They are programs that stand on the library. Nothing of it imports them, and only what
they take and print on a terminal is an interface.
"""
