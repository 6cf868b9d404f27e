"""Sets of the Long Range Arena, read from local files."""
