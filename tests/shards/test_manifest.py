"""The manifest's file: what is written is read, in any JSON's layout, and no change to it goes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.manifest import MANIFEST, Manifest, ShardTable, parse_manifest, read_manifest, write_manifest


def table(split: str, shards: int) -> ShardTable:
    random = np.random.default_rng(shards)
    checksums = [random.integers(0, 256, (shards, width), dtype=np.uint8) for width in (16, 32)]
    return ShardTable(split, random.integers(1, 999, shards), random.integers(1, 10**12, shards), *checksums)


@pytest.fixture
def written(tmp_path: Path) -> Manifest:
    vocabulary = Vocabulary(("large", "small"), ("cube",), ("wood",))
    splits = {"train": table("train", 300), "test": table("test", 2)}
    manifest = Manifest("full", (320, 240), (320, 240), 10, "none", "official", "abc", vocabulary, splits)
    write_manifest(tmp_path, manifest)
    return manifest.sealed()


def same(one: Manifest, other: Manifest) -> bool:
    columns = ("samples_S", "bytes_S", "xxh3_128_S16", "index_sha256_S32")
    return one._head() == other._head() and all(
        np.array_equal(getattr(one.splits[split], name), getattr(other.splits[split], name))
        for split in one.splits
        for name in columns
    )


def test_what_is_written_is_read(tmp_path: Path, written: Manifest) -> None:
    assert same(read_manifest(tmp_path), written)
    assert read_manifest(tmp_path).splits["train"][7] == written.splits["train"][7]


def test_it_is_plain_json(tmp_path: Path, written: Manifest) -> None:
    content = json.loads((tmp_path / MANIFEST).read_bytes())
    assert content["splits"]["test"]["xxh3_128"] == written.splits["test"].xxh3_128_S16.tobytes().hex()
    for layout in ({"indent": 4}, {"separators": (",", ":")}):
        again = parse_manifest(json.dumps(content, **layout).encode(), "it")
        assert again.fingerprint == written.fingerprint
        assert np.array_equal(again.splits["train"].index_sha256_S32, written.splits["train"].index_sha256_S32)


@pytest.mark.parametrize("column", ["xxh3_128", "index_sha256", "samples", "bytes"])
def test_a_changed_column_is_refused(tmp_path: Path, written: Manifest, column: str) -> None:
    content = json.loads((tmp_path / MANIFEST).read_bytes())
    values = content["splits"]["train"][column]
    changed = values[:-1] + ("1" if values[-1] == "0" else "0") if isinstance(values, str) else [*values[:-1], 10**6]
    content["splits"]["train"][column] = changed
    with pytest.raises(UserError, match="it: its fingerprint does not fit its content"):
        parse_manifest(json.dumps(content).encode(), "it")


@pytest.mark.parametrize("value", ["#1", "xyz", "ab", 7, None, ["ab"]])
def test_a_column_that_holds_no_checksums_is_refused(tmp_path: Path, written: Manifest, value: object) -> None:
    content = json.loads((tmp_path / MANIFEST).read_bytes())
    content["splits"]["train"]["xxh3_128"] = value
    for layout in ({}, {"separators": (",", ":")}):
        with pytest.raises(UserError, match="it: not a manifest of this program"):
            parse_manifest(json.dumps(content, **layout).encode(), "it")


def test_a_cut_file_is_named_with_its_place(tmp_path: Path, written: Manifest) -> None:
    data = (tmp_path / MANIFEST).read_bytes()
    for size in (10, len(data) // 2, len(data) - 3):  # in the head, within a column, behind all columns
        with pytest.raises(json.JSONDecodeError) as plain:
            json.loads(data[:size])
        with pytest.raises(UserError) as ours:
            parse_manifest(data[:size], "it")
        assert str(plain.value) in str(ours.value)
        assert "\n" not in str(ours.value)
