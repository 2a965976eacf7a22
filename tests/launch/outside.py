"""The command line as a user meets it, in this process: what it returns and prints. And one data set in every form."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from launch import cli
from tests.shards.archives import Files, archive_of, archive_server


class Said(NamedTuple):
    """What a command returned and printed."""

    status: int
    out: str
    err: str


def nsi(*arguments: object) -> Said:
    """One command."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = cli.run([str(argument) for argument in arguments])
    return Said(status, out.getvalue(), err.getvalue())


def shard(*arguments: object) -> Said:
    """`nsi shard`, in one process and five scenes a shard unless told otherwise."""
    return nsi("shard", "--workers", 1, "--shard_samples", 5, *arguments)


def done(said: Said) -> str:
    """What a command printed that did as it was told."""
    assert said.status == 0, said.err
    return said.out


def refused(said: Said, status: int = 1) -> str:
    """A failed command's only line."""
    assert said.status == status, said
    assert said.err.startswith("nsi ")
    assert said.err.count("\n") == 1
    assert said.err.endswith("\n")
    return said.err


def contents(folder: Path) -> dict[str, bytes]:
    """All that lies below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def write_files(files: Files, folder: Path) -> Path:
    """Files on disk."""
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def in_v1(files: Files) -> Files:
    """The same files as v1 names them, many scenes in a folder."""
    renamed: list[tuple[str, bytes]] = []
    for name, content in files:
        base = name.rpartition("/")[2]
        for v2, v1 in (("_flat_0003.", "_flat."), ("_depth_0003.", "_depth_0001."), ("_shadow_0003.", "_shadow_0001.")):
            base = base.replace(v2, v1)
        renamed.append((f"clevrtex_full/{len(renamed) // 50}/{base.replace('_0003.', '.')}", content))
    return renamed


def edited(files: Files, number: int, change: Callable[[dict[str, Any]], Any]) -> Files:
    """The same files, but for one scene's JSON."""
    name = [name for name, _ in files if name.endswith(".json")][number]
    facts = json.loads(dict(files)[name])
    change(facts)
    return [(each, json.dumps(facts).encode() if each == name else content) for each, content in files]


def gzipped(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, 1, mtime=0))
    return path


@contextlib.contextmanager
def in_form(form: str, files: Files, folder: Path) -> Iterator[list[str]]:
    """Files as a source of a kind, and what a user would call it."""
    folder.mkdir()
    if form in ("v2", "v1"):
        yield [str(write_files(files if form == "v2" else in_v1(files), folder))]
    elif form == "tar":
        (folder / "clevrtex.tar").write_bytes(archive_of(files))
        yield [str(folder / "clevrtex.tar")]
    elif form == "tar.gz":
        yield [str(gzipped(folder / "clevrtex.tar.gz", archive_of(files)))]
    elif form == "three tar.gz":  # cut anywhere, as the published parts are: a scene goes on in the next
        third = len(files) // 3 + 1
        parts = [archive_of(files[start : start + third]) for start in range(0, len(files), third)]
        yield [str(gzipped(folder / f"part{number}.tar.gz", part)) for number, part in enumerate(parts)]
    else:
        assert form in ("URL", "URL of tar.gz")
        archive = archive_of(files)
        with archive_server(archive if form == "URL" else gzip.compress(archive, 1)) as server:
            yield [server.url("clevrtex.tar" if form == "URL" else "clevrtex.tar.gz")]
