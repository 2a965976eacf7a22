"""The manifest: the one file that says what a folder of shards holds, with a fingerprint over all of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from nsi.errors import UserError
from nsi.schema import Vocabulary

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many samples it holds, its size, and the checksums of it and of its index."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    variant: str  # the data set's own name of itself: full, outd, camo, ...
    image_size: tuple[int, int]  # width, height in pixels of every image and mask
    max_objects: int  # most objects in one scene
    transform: str  # what was done to the images on the way in
    split_rule: str
    source: str  # digest over the source: its JSONs, and its pictures' sizes
    vocabulary: Vocabulary
    splits: dict[str, tuple[Shard, ...]]
    fingerprint: str = ""
    format: int = FORMAT

    def samples(self, split: str) -> int:
        """How many samples a split holds."""
        return sum(shard.samples for shard in self.splits[split])

    def sealed(self) -> Manifest:
        """The same manifest with its fingerprint: sha256 over everything else."""
        return Manifest(**{**self.__dict__, "fingerprint": self._digest()})

    def _digest(self) -> str:
        content = {name: value for name, value in asdict(self).items() if name != "fingerprint"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the sealed manifest to a temporary name, syncs it and renames it."""
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("w") as file:
        json.dump(asdict(manifest.sealed()), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards.

    Raises UserError where there is none, where it was written by a newer version, or where it was changed by hand.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; write the shards with `nsi shard SOURCE {folder}`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write the shards again with `nsi shard`") from None
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path}: not a manifest of this program; write the shards again with `nsi shard`")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: format {content['format']}, but this version reads {FORMAT}; upgrade the program")
    try:
        manifest = Manifest(
            **{
                **content,
                "image_size": tuple(content["image_size"]),
                "vocabulary": Vocabulary(**{name: tuple(names) for name, names in content["vocabulary"].items()}),
                "splits": {
                    name: tuple(Shard(**shard) for shard in shards) for name, shards in content["splits"].items()
                },
            }
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest of this program ({error}); write the shards again") from None
    if manifest.sealed() != manifest:
        raise UserError(f"{path}: its fingerprint does not fit its content; write the shards again with `nsi shard`")
    return manifest
