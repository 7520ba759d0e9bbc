"""Time limits of tests."""

HANG_S = 600
"""Seconds after which something has hung. Tests that pass never wait this long, even if the machine is very busy."""
