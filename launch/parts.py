"""`--part i/N`: one of many runs that write a folder together."""

from __future__ import annotations

import re

from nsi.errors import UsageError
from shards.writing.write import Part


def parse_part(text: str) -> Part | None:
    """The part that is asked for, None for "". Raises UsageError where it is none."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--part {text}: give i/N with i from 1 to N, as in 3/8")
    return Part(int(found[1]), int(found[2]))
