"""The command `grutrace`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from grutrace.errors import missing_library_message


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code. See `grutrace.cli`."""
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
