"""The commands of `grutrace`.

Exit codes: 0 yes or success, 1 no (`verify`, `diff`, `recover`), 2 error. Each command is in a file
of its own; `app` collects them.
"""

from grutrace.cli.app import main

__all__ = ["main"]
