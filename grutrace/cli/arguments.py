"""What commands have in common: arguments and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: Exit codes beside 0: the answer is no; there is no answer.
NO, NO_ANSWER = 1, 2

File = Annotated[Path, typer.Argument(help="A trace file.", show_default=False)]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
