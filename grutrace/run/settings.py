"""The settings of a run, and their way to the script's process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

#: The environment variable that carries the settings. It is removed before the script starts.
ENVIRONMENT_VARIABLE = "GRUTRACE_RUN"


@dataclass(frozen=True)
class Settings:
    """The options of a run; those not listed are as for `grutrace.Tracer`.

    Attributes:
        output: Absolute path of the first part.
        sites: Globs for site names; all sites without globs.
        record: Quantities to record.
        max_calls: Limit for all parts of the run together.
        max_bytes: Limit for all parts of the run together, in bytes.
        units: As `parsing.parse_units` reads them.
        steps: As `parsing.parse_steps` reads them.
        on_error: What a write error does to the script. By default, the script continues.
        quiet: Whether to print nothing on standard error.
        python_path: The original PYTHONPATH, which is restored for the script.
    """

    output: str
    sites: tuple[str, ...]
    record: tuple[str, ...]
    mode: str = "w"
    stacks: str = "auto"
    check: str = "warn"
    gates: str = "auto"
    every: int = 1
    max_calls: int | None = None
    max_bytes: int | None = None
    dtype: str | None = None
    units: str | None = None
    steps: str | None = None
    on_error: str = "warn"
    fsync: bool = False
    compression: str | None = None
    checksums: bool = False
    weights: str = "auto"
    compiled: str = "auto"
    state_memory: int | None = None
    buffer: int | None = None
    quiet: bool = False
    python_path: str | None = None

    def to_text(self) -> str:
        """Return the settings as text for the environment variable."""
        return json.dumps(asdict(self))


def from_text(text: str) -> Settings:
    """Return the settings from the text of `Settings.to_text`."""
    fields = json.loads(text)
    return Settings(**fields | {name: tuple(fields[name]) for name in ("sites", "record")})
