"""A run of one rank, watched from outside while something is done to its storage, and one that nothing disturbs."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

from cluster.checkpoints.checkpoint import COMPLETE, newest_verified
from cluster.records.prometheus import TARGETS
from launch import runfolder
from tests.chaos.chaos import LIFE_S, command
from tests.chaos.world import RankProcesses, Zygote
from tests.launch.outside import contents


class Watched:
    """A run of one rank, and what can be seen of it from outside."""

    def __init__(self, mother: Zygote, arguments: list[str], run: Path, log: Path) -> None:
        """`run`: where the folder lies for us."""
        self.ranks, self.run, self.checkpoints = RankProcesses(mother, 1, arguments, log, {}), run, run / "checkpoints"

    def until(self, condition: Callable[[], object]) -> None:
        """Waits for it while the rank trains."""
        met = False

        def look() -> bool:
            nonlocal met
            met = bool(condition())
            return met

        gone = self.ranks.wait(LIFE_S, look)
        assert met, self.ranks.said()
        assert not gone, self.ranks.said()

    def served(self) -> dict[str, float]:
        """What the rank's endpoint says."""
        (target,) = (self.run / TARGETS).glob("*.json")
        address = json.loads(target.read_text())[0]["targets"][0]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("nsi_")}

    def steps(self) -> float:
        """Steps done, as the endpoint tells: files may be where no one can write them."""
        return self.served()["nsi_progress_steps"]

    def good(self) -> dict[str, dict[str, bytes]]:
        """All complete checkpoints, with every byte."""
        found = {}
        for mark in self.checkpoints.glob(f"step-*/{COMPLETE}"):
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile, which its absence tells
                found[mark.parent.name] = contents(mark.parent)
        return found

    def newest(self) -> int:
        """The step of the newest checkpoint that verifies; 0 where there is none."""
        path = newest_verified(self.checkpoints, lambda text: None)
        return json.loads((path / "state.json").read_text())["step"] if path else 0

    def go_on_in_trouble(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Waits until the storage's trouble is told and steps go on, over the time of three checkpoints in which none
        gets through; those before stay as they were."""
        first = self.newest()
        assert first

        def undone() -> bool:
            before, reached = self.good(), self.steps()
            self.until(lambda: (meanwhile(), self.steps() >= reached + 12)[1])
            return self.served()["nsi_storage_failures_total"] > 0 and self.good() == before

        self.until(undone)
        assert self.newest() >= first

    def stop(self) -> int:
        """Ends it in order, and returns its status."""
        (self.run / runfolder.STOP).touch()
        return self.status()

    def status(self) -> int:
        """How it ended."""
        assert self.ranks.wait(LIFE_S), self.ranks.said()
        return self.ranks.statuses[0]

    def said(self) -> list[str]:
        """Its lines, but for those of steps and validations."""
        lines = Path(f"{self.ranks.log}.0").read_text().splitlines()
        return [line for line in lines if not line.startswith("step ")]


class Whole:
    """A run that nothing disturbs, as long as anyone has needed so far."""

    def __init__(self, mother: Zygote, shards: Path, folder: Path) -> None:
        self._mother, self._shards, self._folder, self._steps = mother, shards, folder, 0

    def upto(self, steps: int) -> Path:
        """The run, with at least so many steps."""
        if steps > self._steps:
            self._steps = max(steps, 150)
            start = command(self._shards, self._folder / "run", 1, self._steps)
            ranks = RankProcesses(self._mother, 1, start, self._folder / "log", {})
            assert ranks.wait(LIFE_S), ranks.said()
            assert ranks.statuses == {0: 0}, ranks.said()
        return self._folder / "run"
