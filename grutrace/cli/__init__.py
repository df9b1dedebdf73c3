"""The commands: arguments to functions to an exit code.

0 is success, 1 means that the answer is no, 2 that there is no answer. One command a file; `app`
puts them together.
"""

from grutrace.cli.app import main

__all__ = ["main"]
