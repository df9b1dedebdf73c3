"""Hook for MkDocs: show links to files outside docs/ as text.

The site has no such files. Links such as
``[test_name](../tests/test_file.py)`` work in a checkout, where most readers
follow them. tests/test_docs.py checks that their targets exist.
"""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each link to a file outside docs/ by its text, as code."""
    return OUTSIDE.sub(r"`\1`", markdown)
