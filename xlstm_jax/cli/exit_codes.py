"""What a command tells whoever called it."""

DONE = 0  # or cleanly pre-empted
BAD_ARGUMENT = 2  # or a configuration that cannot be used
DIVERGED = 3
WRONG_RESULT = 5  # `convert --compare` measured a difference
INTERRUPTED = 130  # by Ctrl-C where there was nothing to save
