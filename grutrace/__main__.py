"""Entry point of the command `grutrace`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from grutrace.errors import missing_library_message
from grutrace.native.library import version_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of `grutrace.cli`.

    Only ``--version`` and ``--help`` work without the extra `cli`; the help then says what to
    install.

    Args:
        argv: Arguments of the command; those of the process by default.

    Returns:
        The exit code: 0 yes or success, 1 no, 2 error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(version_line())
        return 0
    try:
        from grutrace import cli
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("grutrace"):
            raise
        library = (error.name or "").partition(".")[0]
        message = missing_library_message("the command line", library, "cli")
        is_help = arguments == ["--help"]
        output = sys.stdout if is_help else sys.stderr
        print(f"grutrace: {message} (the extra 'cli' of grutrace)", file=output)
        return 0 if is_help else 2
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
