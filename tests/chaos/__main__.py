"""`make chaos`: a hundred faults over worlds of 1 to 4 ranks, as a table and as JSON; fails where a promise is broken.

python -m tests.chaos [KILLS] [SEED] [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from shards.synthetic.write import write_scenes
from tests.chaos.chaos import Outcome, loss_difference, torment, uninterrupted
from tests.chaos.faults import DEATHS, STOPS
from tests.chaos.world import zygote
from tests.making import make_shards

A_RUN = 10  # faults; a longer run would say more of rounding than of faults


def main(kills: int = 100, seed: int = 0, folder: Path | None = None) -> int:
    """Prints the table; the status is 1 where anything was lost, not proven, or left behind."""
    folder = folder or Path(tempfile.mkdtemp(prefix="nsi-chaos-"))
    write_scenes(folder / "scenes", 60, seed=7, size=(64, 48), workers=1, report=lambda done: None)
    make_shards(folder / "scenes", folder / "shards", shard_samples=10)
    with zygote(folder) as mother:
        rounds = []
        for number in range(-(-kills // A_RUN)):
            count = min(A_RUN, kills - number * A_RUN)
            rounds.append(torment(mother, folder / "shards", folder / f"run-{number}", seed + number, count))
            print(f"{sum(len(each.outcomes) for each in rounds)} of {kills}", file=sys.stderr)
        whole = uninterrupted(mother, folder / "shards", folder / "whole", max(each.steps for each in rounds))
    differences = [loss_difference(each.run, whole) for each in rounds]
    told: dict[tuple[str, str], list[tuple[Outcome, float]]] = defaultdict(list)
    for each, difference in zip(rounds, differences, strict=True):
        for outcome in each.outcomes:
            told[_kind(outcome), _place(outcome)].append((outcome, difference))
    print("\n".join(_table(told)))
    troubles = [
        *(f"{each.run}: {each.audit.strip()}" for each in rounds if each.audit),
        *(f"{each.run}: {each.left} processes left" for each in rounds if each.left),
        *(f"{each.run}: {each.unaccounted_s:.2f} s in no bucket" for each in rounds if each.unaccounted_s > 0.01),
        *(f"{each.run}: {wrong}" for each in rounds for wrong in each.wrong_restores),
        *(f"{each.run}: losses differ by {d:.1e}" for each, d in zip(rounds, differences, strict=True) if d >= 1e-5),
    ]
    facts = [
        {"run": str(each.run), "steps": each.steps, "loss_difference": difference, "audit": each.audit or "proven"}
        | {"outcomes": [asdict(outcome) for outcome in each.outcomes]}
        for each, difference in zip(rounds, differences, strict=True)
    ]
    (folder / "chaos.json").write_text(json.dumps({"troubles": troubles, "rounds": facts}, indent=1))
    print(f"\n{folder / 'chaos.json'} has each of them", "; ".join(troubles) or "; all proven", sep="")
    return int(bool(troubles))


def _kind(outcome: Outcome) -> str:
    """The faults of which a run should make the same."""
    kinds = next((kinds for kinds in (STOPS, DEATHS) if outcome.fault.kind in kinds), ("SIGKILL",))
    return "; ".join(kinds)


def _place(outcome: Outcome) -> str:
    """The moment, in a word or two; `chaos.json` has the call and the file."""
    if not outcome.struck:
        return "not struck: ended before"
    if outcome.moment.startswith("at "):
        return "at a call that changes a file or a name"
    return outcome.moment.partition(",")[0]


def _table(told: dict[tuple[str, str], list[tuple[Outcome, float]]]) -> list[str]:
    lines = [
        "| fault | moment | tried | survived | samples lost | samples repeated | largest loss difference"
        " | seconds until all are gone | until the next checkpoint |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for (kind, moment), pairs in sorted(told.items()):
        outcomes = [outcome for outcome, _ in pairs]
        saved = [outcome.saved_s for outcome in outcomes if outcome.saved_s is not None]
        launcher = sum(not outcome.by_itself for outcome in outcomes)
        lines.append(
            f"| {kind} | {moment} | {len(outcomes)} | {sum(each.survived for each in outcomes)} "
            f"| {max(each.samples_lost for each in outcomes)} | {sum(each.samples_repeated for each in outcomes)} "
            f"| {max(difference for _, difference in pairs):.1e} "
            f"| {max(each.gone_s for each in outcomes):.1f}{f' ({launcher} by the launcher)' if launcher else ''} "
            f"| {f'{max(saved):.1f}' if saved else '-'} |"
        )
    return lines


if __name__ == "__main__":
    given = sys.argv[1:]
    kills, seed = (int(each) for each in (given + ["100", "0"][len(given) :])[:2])
    sys.exit(main(kills, seed, Path(given[2]) if given[2:] else None))
