"""Loaded by Python itself before the script of a `grutrace run` (see grutrace/run/launch.py)."""

import os
import sys

# Not in front: what the script imports, and what this imports, must not come from beside grutrace.
_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
sys.path.append(_root)
try:
    from grutrace.run.begin import begin
finally:
    sys.path.remove(_root)
begin(os.path.dirname(__file__))
