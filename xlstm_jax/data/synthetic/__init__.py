"""Tasks whose samples are computed, not read."""
