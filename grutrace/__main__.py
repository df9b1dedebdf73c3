"""Entry point of the command `grutrace`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from grutrace.errors import missing_library_message


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of `grutrace.cli`.

    Args:
        argv: Arguments of the command; those of the process by default.

    Returns:
        The exit code.
    """
    try:
        from grutrace import cli
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("grutrace"):
            raise
        library = (error.name or "").partition(".")[0]
        print(f"grutrace: {missing_library_message('a command', library, 'cli')}", file=sys.stderr)
        return 2
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
