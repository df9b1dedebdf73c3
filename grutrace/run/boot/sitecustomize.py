"""Loaded by Python itself before the script of a `grutrace run` (see grutrace/run/launch.py)."""

import os
import sys

# Not in front: what the script imports, and what this imports, must not come from beside grutrace.
_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
sys.path.append(_root)
try:
    from grutrace.run.bootstrap import start_run
finally:
    # The one at the end: it may stand on PYTHONPATH as well.
    del sys.path[len(sys.path) - 1 - sys.path[::-1].index(_root)]
start_run(os.path.dirname(__file__))
