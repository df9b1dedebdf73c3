"""What a run was asked for, on its way from the command to the script's process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

#: The environment variable that it travels in. The script does not get to see it.
ENVIRONMENT_VARIABLE = "GRUTRACE_RUN"


@dataclass(frozen=True)
class Settings:
    """The options of a run; as for `grutrace.Tracer` where not said otherwise.

    Attributes:
        output: File of the first part; absolute.
        sites: Globs; none for all sites.
        record: Quantities.
        max_calls: Of the whole run, all its parts together.
        max_bytes: Likewise.
        units: As `parsing.parse_units` reads them.
        steps: As `parsing.parse_steps` reads them.
        on_error: What a failing file does to the script. Unlike a tracer's, it goes on by itself.
        quiet: Whether to say nothing on standard error.
        python_path: PYTHONPATH as the script shall have it.
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
    weights: str = "auto"
    compiled: str = "auto"
    state_memory: int | None = None
    quiet: bool = False
    python_path: str | None = None

    def to_text(self) -> str:
        """As text for the environment."""
        return json.dumps(asdict(self))


def from_text(text: str) -> Settings:
    """What `Settings.to_text` gave."""
    fields = json.loads(text)
    return Settings(**fields | {name: tuple(fields[name]) for name in ("sites", "record")})
