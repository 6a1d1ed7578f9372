"""Hundreds of thousands of connections, each judged by both of its sides.

`python -m evidence.soak --help`; docs/soak.md says what it does.
"""
