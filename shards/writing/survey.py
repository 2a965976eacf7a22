"""Reads every scene's JSON before anything is written: what there is, whether it fits together, which names occur."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.processes import as_they_end
from shards.sources.listing import Folder, Names, merge_names, read_scenes
from shards.sources.scene import Scene
from shards.writing.vocabulary import build_vocabulary

_FOLDERS_A_TASK = 128  # v2 has a folder for each scene
Report = Callable[[int], None]


@dataclass(frozen=True)
class Survey:
    """All scenes of a source, sorted by index, and the vocabulary of their names."""

    scenes: tuple[Scene, ...]
    vocabulary: Vocabulary

    @property
    def variant(self) -> str:
        """The data set's own name of itself."""
        return self.scenes[0].variant

    @property
    def max_objects(self) -> int:
        """Most objects in one scene."""
        return max(scene.objects for scene in self.scenes)


def survey_folders(folders: Iterable[Folder], pool: Executor, report: Report) -> Survey:
    """Reads and checks every scene of some folders, while these are found.

    `report` is told how many are done, for the first time when all folders are known. Raises UserError for a scene that
    is not usable, and where scenes do not belong together.
    """
    waiting = iter(folders)
    tasks = iter(lambda: list(islice(waiting, _FOLDERS_A_TASK)), [])
    scenes: list[Scene] = []
    names: list[Names] = []
    for some_scenes, some_names in as_they_end(pool, read_scenes, tasks):
        scenes += some_scenes
        names.append(some_names)
        report(len(scenes))
    return survey_scenes(scenes, merge_names(names))


def survey_scenes(scenes: Iterable[Scene], names: Names) -> Survey:
    """The survey of scenes that have been read.

    Raises UserError where two have the same key or index or differ in variant, and for a name CLEVRTex does not have.
    """
    in_order = tuple(sorted(scenes, key=lambda scene: (scene.index, scene.key)))
    _check_distinct(in_order)
    return Survey(in_order, build_vocabulary(names))


def _check_distinct(scenes: Sequence[Scene]) -> None:
    keys, indices, variants = ({getattr(scene, name) for scene in scenes} for name in ("key", "index", "variant"))
    if len(keys) == len(indices) == len(scenes) and len(variants) == 1:
        return
    seen: dict[object, Scene] = {}
    for scene in scenes:
        if scene.variant != scenes[0].variant:
            raise UserError(
                f"{scene.where}: variant {scene.variant}, but {scenes[0].key} has {scenes[0].variant}; "
                "shard each data set from a folder of its own"
            )
        for name in (scene.key, scene.index):
            if name in seen:
                raise UserError(
                    f"{scene.where}: scene {name} is also in {seen[name].where}; give each data set a folder of its own"
                )
            seen[name] = scene
