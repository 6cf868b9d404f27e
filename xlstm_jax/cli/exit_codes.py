"""Exit codes of the commands. An unexpected exception is a bug and ends with Python's 1."""

DONE = 0  # also: stopped by a signal after saving a checkpoint
BAD_ARGUMENT = 2  # or a configuration, data, weights or a checkpoint that cannot be used
DIVERGED = 3  # too many consecutive updates were skipped
MACHINE_FAILED = 4  # full disk, I/O or network error, out of memory; the same command resumes
WRONG_RESULT = 5  # `convert --compare` or `replay` measured other numbers
INTERRUPTED = 130  # by Ctrl-C without anything to save, or by a second signal
