"""Kill runs, fail their disks, cut their power, read growing files; report what was lost.

    python -m tools.soak [kills] [faults] [power] [fsync] [live]
        [--tries N] [--seconds S] [--seed N] [--folder FOLDER] [--json FILE]

Without a name, all of them. Prints a table of Markdown for each, and on standard error what went
wrong; and ends with 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tools.soak import disk

NAMES = ("kills", "faults", "power", "fsync", "live")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("what", nargs="*", choices=[[], *NAMES])
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=180.0, help="Duration of `live`.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Folder for the files.")
    parser.add_argument("--json", type=Path, help="File for all outcomes.")
    asked = parser.parse_args()
    if os.name != "posix":
        parser.error("the soak forks and kills processes: it needs a POSIX system")
    if not disk.is_under_us():
        disk.start_again(Path(tempfile.mkdtemp(prefix="soak-", dir=asked.folder)))
    folder = disk.folder()
    try:
        return _run(asked, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(asked: argparse.Namespace, folder: Path) -> int:
    # Loads torch, and everything else before the forks.
    from tools.soak.report import SECTIONS, report
    from tools.soak.victims import warm_up

    warm_up()
    outcomes, wrong = {}, []
    for name in asked.what or SECTIONS:
        outcomes[name] = SECTIONS[name](folder, asked)
        wrong += report(name, outcomes[name])
    if asked.json:
        asked.json.write_text(json.dumps(outcomes))
    for message in wrong:
        print(message, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
