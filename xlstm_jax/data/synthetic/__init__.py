"""Synthetic tasks: their samples are generated, not read from files."""
