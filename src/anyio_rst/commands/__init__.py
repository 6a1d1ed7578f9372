"""The commands of `anyio-rst`: one module each.

They are programs that stand on the library. Nothing of it imports them, and only what
they take and print on a terminal is an interface.
"""
