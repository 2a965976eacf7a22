"""Shards that were damaged in any one place: `nsi verify` names the file, and no reader ever gets other bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsi.errors import UserError
from shards.index import MEMBERS
from shards.reading.dataset import open_split
from tests.launch.outside import done, nsi, shard, write_files
from tests.shards.archives import files_of

SCENES = 9  # 1 test, 1 val, 7 train
SPLITS = ("train", "val", "test")
Written = dict[tuple[str, int, str], str]  # a split, a sample and a member: the sha256 of its bytes

many = settings(
    derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two scenes each; every test leaves them as they were."""
    place = tmp_path_factory.mktemp("damage")
    source = write_files(files_of(scenes, SCENES), place / "source")
    done(shard(source, place / "shards", "--shard_samples", 2))
    return place / "shards"


@pytest.fixture(scope="module")
def written(folder: Path) -> Written:
    return read_all(folder)


def read_all(folder: Path) -> Written:
    """Every member of every sample that can be read; what cannot be is told of by a UserError."""
    found: Written = {}
    for name in SPLITS:
        with contextlib.suppress(UserError):
            split = open_split(folder, name)
            for sample in range(len(split)):
                for member in MEMBERS:
                    with contextlib.suppress(UserError):
                        found[name, sample, member] = sha256(split.read(sample, member)).hexdigest()
    return found


@contextlib.contextmanager
def damaged(path: Path, data: bytes) -> Iterator[None]:
    """A file with other bytes, for a while."""
    whole = path.read_bytes()
    assert data != whole
    try:
        path.write_bytes(data)
        yield
    finally:
        path.write_bytes(whole)


def check_found(folder: Path, path: Path, written: Written) -> None:
    """The damage of one file is told, and nobody reads anything else than was written."""
    said = nsi("verify", folder, "--workers", 1)
    assert said.status == 1
    assert said.err.count("\n") == 1
    assert f"{path}: " in said.out + said.err
    assert read_all(folder).items() <= written.items()


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_whole_shards_are_found_whole(folder: Path, written: Written) -> None:
    assert len(written) == SCENES * len(MEMBERS)
    assert len(files_in(folder)) == 2 * 6 + 1
    assert "9 samples, all as they were written" in done(nsi("verify", folder, "--workers", 1))


@many
@given(data=st.data())
def test_any_byte(folder: Path, written: Written, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files_in(folder)), label="file")
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1), label="place")
    content[place] ^= data.draw(st.integers(1, 255), label="change")
    with damaged(path, bytes(content)):
        check_found(folder, path, written)


@many
@given(data=st.data())
def test_any_byte_of_the_manifest_that_is_another_space_or_case(
    folder: Path, written: Written, data: st.DataObject
) -> None:
    """JSON and hexadecimal digits say the same in several ways."""
    path = folder / "manifest.json"
    content = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(content) if chr(byte).isspace() or chr(byte) in "abcdef"]
    place = data.draw(st.sampled_from(places), label="place")
    others = b" \n\t\r" if chr(content[place]).isspace() else chr(content[place]).upper().encode()
    content[place] = data.draw(st.sampled_from(sorted({*others} - {content[place]})), label="other")
    with damaged(path, bytes(content)):
        check_found(folder, path, written)


@many
@given(data=st.data())
def test_any_truncation(folder: Path, written: Written, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files_in(folder)), label="file")
    content = path.read_bytes()
    with damaged(path, content[: data.draw(st.integers(0, len(content) - 1), label="length")]):
        check_found(folder, path, written)


@many
@given(data=st.data())
def test_any_file_in_anothers_place(folder: Path, written: Written, data: st.DataObject) -> None:
    path, other = data.draw(st.permutations(files_in(folder)), label="files")[:2]
    with damaged(path, other.read_bytes()):
        check_found(folder, path, written)


def test_any_file_missing(folder: Path, written: Written) -> None:
    for path in files_in(folder):
        content = path.read_bytes()
        path.unlink()
        try:
            check_found(folder, path, written)
        finally:
            path.write_bytes(content)


def test_one_byte_costs_one_member(folder: Path, written: Written) -> None:
    """All the rest can still be read."""
    sample = open_split(folder, "train").locate([1])[0]
    path = folder / sample.span.shard
    content = bytearray(path.read_bytes())
    content[sample.mask.offset + 40] ^= 1
    with damaged(path, bytes(content)):
        assert written.keys() - read_all(folder).keys() == {("train", 1, "mask")}
