"""Which scenes train, validate and test: by rank of their index, in the proportions of a published split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from nsi.errors import UserError
from shards.sources.scene import Scene

SplitRule = Literal["official", "reference", "test"]
SPLITS = ("train", "val", "test")
OWN = "own"  # what a manifest says where the source had splits of its own
_OUT_OF_DISTRIBUTION = ("outd", "ood")  # the variant that is published without a split: all of it is for testing

# Each rule lists (split, share) in the order of the scenes' indices.
# official: CLEVRTex (Karazija et al. 2021). reference: the public NSI code, whose train split holds the official test.
_RULES: dict[str, tuple[tuple[str, float], ...]] = {
    "official": (("test", 0.10), ("val", 0.10), ("train", 0.80)),
    "reference": (("train", 0.75), ("val", 0.05), ("test", 0.20)),
}

Item = TypeVar("Item")


def split_scenes(scenes: Sequence[Scene], rule: SplitRule) -> tuple[str, dict[str, Sequence[Scene]]]:
    """Scenes, sorted by index, in their splits; first the rule that was followed in the end.

    A source that has splits keeps them. Raises UserError for too few scenes.
    """
    if scenes[0].split:
        return OWN, {name: part for name in SPLITS if (part := [scene for scene in scenes if scene.split == name])}
    followed = followed_rule(rule, scenes[0].variant)
    return followed, {"test": scenes} if followed == "test" else split_by_rank(scenes, followed)


def followed_rule(rule: SplitRule, variant: str) -> SplitRule:
    """The rule for scenes without splits of their own: all of the out-of-distribution variant is for testing."""
    return "test" if rule == "official" and variant in _OUT_OF_DISTRIBUTION else rule


def split_by_rank(items: Sequence[Item], rule: SplitRule) -> dict[str, Sequence[Item]]:
    """Cuts items, sorted by index, into the three splits; every split gets at least one.

    At 50,000 scenes the cuts are exactly the published ones. Raises UserError for fewer than three items.
    """
    count = len(items)
    if count < len(SPLITS):
        raise UserError(f"{count} scenes cannot fill the splits train, val and test: give at least 3, or --splits test")
    cuts = [0]
    total = 0.0
    shares = _RULES[rule]
    for place, (_, share) in enumerate(shares):
        total += share
        left = len(shares) - 1 - place
        cuts.append(min(max(round(count * total), cuts[-1] + 1), count - left))
    parts = {name: items[start:end] for (name, _), start, end in zip(shares, cuts, cuts[1:], strict=False)}
    return {name: parts[name] for name in SPLITS}
