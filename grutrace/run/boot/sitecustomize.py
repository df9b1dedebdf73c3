"""Python loads this module before the script of `grutrace run` (see grutrace/run/launch.py)."""

import os
import sys

# At the end, so that no module in the folder of grutrace hides one of the script's.
_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
sys.path.append(_root)
try:
    from grutrace.run.bootstrap import start_run
finally:
    # Remove the last entry: PYTHONPATH may contain the folder as well.
    del sys.path[len(sys.path) - 1 - sys.path[::-1].index(_root)]
start_run(os.path.dirname(__file__))
