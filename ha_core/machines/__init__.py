"""The pure part: everything that decides. Synchronous, no I/O, no clock, no randomness of its own (machines/contract.py)."""
