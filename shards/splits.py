"""Which scenes train, validate and test: by rank of their index, in the proportions of a published split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from nsi.errors import UserError

SplitRule = Literal["official", "reference"]
SPLITS = ("train", "val", "test")

# Each rule lists (split, share) in the order of the scenes' indices.
# official: CLEVRTex (Karazija et al. 2021). reference: the public NSI code, whose train split holds the official test.
_RULES: dict[str, tuple[tuple[str, float], ...]] = {
    "official": (("test", 0.10), ("val", 0.10), ("train", 0.80)),
    "reference": (("train", 0.75), ("val", 0.05), ("test", 0.20)),
}

Item = TypeVar("Item")


def split_by_rank(items: Sequence[Item], rule: SplitRule) -> dict[str, Sequence[Item]]:
    """Cuts items, sorted by index, into the three splits; every split gets at least one.

    At 50,000 scenes the cuts are exactly the published ones. Raises UserError for fewer than three items.
    """
    count = len(items)
    if count < len(SPLITS):
        raise UserError(f"{count} scenes cannot fill the splits train, val and test: give at least 3")
    cuts = [0]
    total = 0.0
    shares = _RULES[rule]
    for place, (_, share) in enumerate(shares):
        total += share
        left = len(shares) - 1 - place
        cuts.append(min(max(round(count * total), cuts[-1] + 1), count - left))
    parts = {name: items[start:end] for (name, _), start, end in zip(shares, cuts, cuts[1:], strict=False)}
    return {name: parts[name] for name in SPLITS}
