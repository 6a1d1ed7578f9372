"""What becomes of a reset on its way to real programs: `python -m interop.run --help`."""
