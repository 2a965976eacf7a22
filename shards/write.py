"""Writes raw scenes as shards: first every scene is checked, then every shard is written, then the manifest.

    OUT/train-000000.tar        samples, readable by plain webdataset
    OUT/train-000000.index.npy  where each member lies, and its checksum
    OUT/manifest.json           written last: a folder that has it is complete
    OUT/.unfinished/            what is done so far, while a run is on its way

A shard's bytes depend on its scenes alone, so any number of workers, and a run that was cut and started again,
give the same folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.index import JSON_SUFFIX, MASK_SUFFIX, build_index, index_path, write_index
from shards.manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from shards.scenes import SceneSummary, check_distinct, find_scene_jsons, read_bytes, read_scene_json, summarise_scene
from shards.splits import SplitRule, split_by_rank
from shards.vocabulary import build_vocabulary

UNFINISHED = ".unfinished"
Report = Callable[[int], None]


@dataclass(frozen=True)
class ShardPlan:
    """One shard that is to be written."""

    name: str
    scenes: tuple[SceneSummary, ...]


def survey(source: Path, workers: int, report: Report) -> list[SceneSummary]:
    """Reads and checks every scene below a folder; sorted by index. `report` is told how many are done.

    Raises UserError for the first scene, in the order of the paths, that is not usable.
    """
    paths = find_scene_jsons(source)
    scenes = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for scene in pool.map(summarise_scene, paths):
                scenes.append(scene)
                report(len(scenes))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    check_distinct(scenes)
    _check_uniform(scenes)
    return sorted(scenes, key=lambda scene: scene.index)


def write_shards(
    scenes: Sequence[SceneSummary], out: Path, rule: SplitRule, shard_samples: int, workers: int, report: Report
) -> Manifest:
    """Writes the shards of surveyed scenes and, last, the manifest. `report` is told how many scenes are done.

    A run that was cut is continued; a folder that is complete is left as it is. Raises UserError where the folder
    holds anything else, or where it cannot be written.
    """
    vocabulary = build_vocabulary(scenes)
    splits = split_by_rank(scenes, rule)
    plans = {split: _plan(split, part, shard_samples) for split, part in splits.items()}
    source = _source_digest(scenes, rule, shard_samples)
    if _is_complete(out, source):
        report(len(scenes))
        return read_manifest(out)
    try:
        notes = _open_folder(out, source)
        done: dict[str, Shard] = {}
        finished = 0
        with ThreadPoolExecutor(workers) as pool:
            tasks = {
                pool.submit(_write_shard, out, notes, plan, vocabulary): plan
                for part in plans.values()
                for plan in part
            }
            try:
                for task in as_completed(tasks):
                    plan = tasks[task]
                    done[plan.name] = task.result()
                    finished += len(plan.scenes)
                    report(finished)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        write_manifest(
            out,
            Manifest(
                variant=scenes[0].variant,
                image_size=scenes[0].image_size,
                max_objects=max(scene.objects for scene in scenes),
                transform="none",
                split_rule=rule,
                source=source,
                vocabulary=vocabulary,
                splits={split: tuple(done[plan.name] for plan in part) for split, part in plans.items()},
            ),
        )
        shutil.rmtree(notes)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: cannot be written ({error.strerror}); mend that and run the same command again, "
            "it continues where it stopped"
        ) from error
    return read_manifest(out)


def encode_schema(facts: dict, key: str, vocabulary: Vocabulary) -> bytes:
    """`KEY.json` of a shard: the schema as ids, and all that the scene's own JSON says, unchanged."""
    objects = []
    for item in facts["objects"]:
        size, shape, material = vocabulary.encode(item["size"], item["shape"], item["material"])
        objects.append({"size": size, "shape": shape, "material": material, "position": item["3d_coords"]})
    content = {"key": key, "index": facts["image_index"], "objects": objects, "scene": facts}
    return json.dumps(content, separators=(",", ":")).encode()


def _write_shard(out: Path, notes: Path, plan: ShardPlan, vocabulary: Vocabulary) -> Shard:
    """Writes one tar and its index, or recognises that an earlier run has done so."""
    tar = out / f"{plan.name}.tar"
    note = notes / f"{plan.name}.json"
    if note.exists():  # written last, so tar and index are whole
        return Shard(**json.loads(note.read_text()))
    temporary = tar.with_name(tar.name + ".tmp")
    # webdataset imports torch (3 s), and the surveys that fail should fail at once.
    from webdataset.writer import TarWriter

    with temporary.open("wb") as file:
        # Fixed time, owner and mode: the same scenes give the same bytes.
        writer = TarWriter(file, encoder=False, mtime=0, user="nsi", group="nsi")
        for scene in plan.scenes:
            writer.write(_sample(scene, vocabulary))
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    index = build_index(temporary)
    write_index(index_path(tar), index)
    temporary.rename(tar)
    shard = Shard(tar.name, len(plan.scenes), tar.stat().st_size, file_sha256(tar), file_sha256(index_path(tar)))
    _write_text(note, json.dumps(asdict(shard)))
    return shard


def _sample(scene: SceneSummary, vocabulary: Vocabulary) -> dict[str, object]:
    files = scene.files
    return {
        "__key__": files.key,
        files.image.suffix[1:]: read_bytes(files.image),
        MASK_SUFFIX: read_bytes(files.mask),
        JSON_SUFFIX: encode_schema(read_scene_json(files.json), files.key, vocabulary),
    }


def _plan(split: str, scenes: Sequence[SceneSummary], shard_samples: int) -> list[ShardPlan]:
    starts = range(0, len(scenes), shard_samples)
    return [
        ShardPlan(f"{split}-{number:06d}", tuple(scenes[start : start + shard_samples]))
        for number, start in enumerate(starts)
    ]


def _check_uniform(scenes: Iterable[SceneSummary]) -> None:
    """Raises UserError where scenes differ in variant or image size: two data sets in one folder."""
    first: SceneSummary | None = None
    for scene in scenes:
        first = first or scene
        for label, ours, theirs in (
            ("variant", scene.variant, first.variant),
            ("image size", scene.image_size, first.image_size),
        ):
            if ours != theirs:
                raise UserError(
                    f"{scene.files.json}: {label} {ours}, but {first.files.json.name} has {theirs}; "
                    "shard each data set from a folder of its own"
                )


def _source_digest(scenes: Iterable[SceneSummary], rule: SplitRule, shard_samples: int) -> str:
    """A digest over what decides the shards' content: the JSONs, and the pictures' sizes, so as not to read them."""
    digest = hashlib.sha256(f"{rule} {shard_samples}".encode())
    for scene in scenes:
        sizes = [path.stat().st_size for path in (scene.files.json, scene.files.image, scene.files.mask)]
        digest.update(f"{scene.files.key} {scene.digest} {sizes}\n".encode())
    return digest.hexdigest()


def _is_complete(out: Path, source: str) -> bool:
    if not (out / MANIFEST).exists():
        return False
    if read_manifest(out).source != source:
        raise UserError(f"{out}: holds the shards of other scenes or settings; choose another folder")
    return True


def _open_folder(out: Path, source: str) -> Path:
    """Makes or continues OUT and returns its folder of notes."""
    notes = out / UNFINISHED
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder to write the shards to")
    if out.exists() and any(out.iterdir()) and not notes.exists():
        raise UserError(f"{out}: is not empty and holds no shards; choose another folder")
    notes.mkdir(parents=True, exist_ok=True)
    plan = notes / "source"
    if not plan.exists():
        _write_text(plan, source)
    elif plan.read_text() != source:
        raise UserError(f"{out}: was begun with other scenes or settings; remove it or choose another folder")
    return notes


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(functools.partial(file.read, 1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()
