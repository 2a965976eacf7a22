"""The reader: the same bytes from mapped, cached and remote shards, few maps open, and clear words where one is off."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from nsi.errors import UserError
from shards.reading.cache import ShardCache
from shards.reading.reader import Span, SpanReader
from shards.reading.storage import Storage, open_storage
from tests.shards.servers import FLIP, QUICK, FileServer, file_server, s3_server

FINGERPRINT = "0123456789abcdef" * 4
FILES = {f"train-{i:06d}.tar": random.Random(i).randbytes(10_000 + i) for i in range(12)}
A, B, C, *_ = FILES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as server:
        server.files.update(FILES)
        yield server


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server() as client:
        client.create_bucket(Bucket="reader")
        for name, data in FILES.items():
            client.put_object(Bucket="reader", Key=f"prefix/{name}", Body=data)
        yield client


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 35_000)  # three shards


def span(name: str, offset: int, size: int) -> Span:
    return Span(name, len(FILES[name]), xxhash.xxh3_128_hexdigest(FILES[name]), offset, size)


def some_spans(number: int) -> list[Span]:
    random_ = random.Random(3)
    spans = []
    for _ in range(number):
        name = random_.choice(list(FILES))
        offset = random_.randrange(len(FILES[name]))
        spans.append(span(name, offset, random_.randrange(len(FILES[name]) - offset + 1)))
    return spans


def expected(spans: list[Span]) -> list[bytes]:
    return [FILES[s.shard][s.offset : s.offset + s.size] for s in spans]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("place", ["local", "http", "s3"])
def test_the_same_bytes_from_everywhere(
    place: str, cached: bool, folder: Path, cache: ShardCache, request: pytest.FixtureRequest
) -> None:
    storage: Storage
    if place == "local":
        storage = open_storage(folder)
    elif place == "http":
        storage = open_storage(request.getfixturevalue("server").url, QUICK)
    else:
        request.getfixturevalue("s3")
        storage = open_storage("s3://reader/prefix", QUICK)
    reader = SpanReader(storage, cache if cached else None, FINGERPRINT, open_shards=4)
    spans = some_spans(100)
    assert reader.read(spans) == expected(spans)
    assert reader.read([]) == []
    assert reader.read(spans[:3]) == expected(spans[:3])


def test_local_spans_are_views(folder: Path) -> None:
    (view,) = SpanReader(open_storage(folder), None, FINGERPRINT).read([span(A, 5, 10)])
    assert isinstance(view, memoryview)
    assert view.readonly


def maps_of(folder: Path) -> int:
    """How many files of a folder this process has mapped, as the kernel says."""
    return sum(f"{folder}/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_few_maps_stay_open(folder: Path) -> None:
    reader = SpanReader(open_storage(folder), None, FINGERPRINT, open_shards=3)
    for name in [*FILES, *FILES]:
        reader.read([span(name, 0, 10)])
        assert maps_of(folder) <= 3
    views = reader.read([span(name, 0, 10) for name in FILES])  # more shards at once than may stay open
    assert views == [data[:10] for data in FILES.values()]
    del views
    assert maps_of(folder) == 3
    del reader
    assert maps_of(folder) == 0


def test_the_shard_used_last_stays_open(folder: Path) -> None:
    reader = SpanReader(open_storage(folder), None, FINGERPRINT, open_shards=2)
    reader.read([span(A, 0, 1), span(B, 0, 1), span(A, 0, 1), span(C, 0, 1)])
    found = Path("/proc/self/maps").read_text()
    assert [name in found for name in (A, B, C)] == [True, False, True]


def test_a_cached_shard_is_downloaded_once(server: FileServer, cache: ShardCache) -> None:
    reader = SpanReader(open_storage(server.url, QUICK), cache, FINGERPRINT)
    spans = [span(A, i, 10) for i in range(50)]
    assert reader.read(spans) == reader.read(spans) == expected(spans)
    other = SpanReader(open_storage(server.url, QUICK), cache, FINGERPRINT)  # another process of the node
    assert other.read(spans) == expected(spans)
    assert server.requests == [(A, None)]


def test_reading_keeps_a_copy_in_the_cache(server: FileServer, cache: ShardCache) -> None:
    reader = SpanReader(open_storage(server.url, QUICK), cache, FINGERPRINT)
    for name in (A, B, A, C, A, *list(FILES)[3:6]):
        reader.read([span(name, 0, 10)])
        reader.read([span(A, 0, 10)])  # mapped all the while, and said to be in use
    assert server.asked(A) == 1
    assert (cache.folder / FINGERPRINT[:16] / A).exists()


def test_a_map_outlives_its_copy(server: FileServer, cache: ShardCache) -> None:
    reader = SpanReader(open_storage(server.url, QUICK), cache, FINGERPRINT)
    reader.read([span(A, 0, 10)])
    (cache.folder / FINGERPRINT[:16] / A).unlink()
    assert reader.read([span(A, 5, 10)]) == [FILES[A][5:15]]
    assert server.asked(A) == 1


def test_a_damaged_copy_is_replaced_once(server: FileServer, cache: ShardCache) -> None:
    """For all of its spans, and all processes that had it mapped."""
    readers = [SpanReader(open_storage(server.url, QUICK), cache, FINGERPRINT) for _ in range(2)]
    spans = [span(A, 0, 10), span(A, 50, 10)]
    readers[0].read(spans)
    copy = cache.folder / FINGERPRINT[:16] / A
    copy.write_bytes(bytes(len(FILES[A])))  # as by a disk that lost it
    for reader, damaged in [(reader, reader.read(spans)) for reader in readers]:
        assert damaged == [bytes(10)] * 2
        assert [reader.read_anew(*each) for each in zip(spans, damaged, strict=True)] == expected(spans)
    assert server.asked(A) == 2
    assert copy.read_bytes() == FILES[A]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of maps")
def test_the_room_of_evicted_copies_is_given_back(server: FileServer, cache: ShardCache) -> None:
    """A copy that is mapped takes its room on the disk, with a name or without."""
    reader = SpanReader(open_storage(server.url, QUICK), cache, FINGERPRINT)
    for name in FILES:
        assert reader.read([span(name, 0, 10)]) == [FILES[name][:10]]
    reader.read([span(name, 0, 10)])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache.folder) in line]
    assert 1 <= len(mapped) <= 3
    assert not any(line.endswith("(deleted)") for line in mapped)


class Crowded(ShardCache):
    """A cache whose copies other processes evict before they are opened, so many times."""

    def get(self, storage: Storage, fingerprint: str, name: str, size: int, xxh3_128: str) -> Path:
        path = super().get(storage, fingerprint, name, size, xxh3_128)
        evictions = path.with_name("evictions")
        done = evictions.stat().st_size if evictions.exists() else 0
        if done < self.limit_bytes // 100_000:
            evictions.write_bytes(b"x" * (done + 1))
            path.unlink()
        return path


def test_a_copy_evicted_before_it_is_opened_is_asked_for_again(server: FileServer, tmp_path: Path) -> None:
    reader = SpanReader(open_storage(server.url, QUICK), Crowded(tmp_path, 200_000), FINGERPRINT)
    assert reader.read([span(A, 0, 10)]) == [FILES[A][:10]]
    assert server.asked(A) == 3
    reader = SpanReader(open_storage(server.url, QUICK), Crowded(tmp_path, 1_000_000), FINGERPRINT)
    with pytest.raises(UserError, match=f"^{tmp_path}: a cache of 1000000 bytes is too small"):
        reader.read([span(B, 0, 10)])


# --- what is off


def test_a_tar_of_another_size(folder: Path) -> None:
    with (folder / A).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=f"^{folder}/{A}: has 10001 bytes, the manifest says 10000; restore"):
        SpanReader(open_storage(folder), None, FINGERPRINT).read([span(A, 0, 10)])
    (folder / A).write_bytes(b"")
    with pytest.raises(UserError, match=f"^{folder}/{A}: .*restore"):
        SpanReader(open_storage(folder), None, FINGERPRINT).read([span(A, 0, 10)])


def test_a_missing_tar(folder: Path) -> None:
    (folder / A).unlink()
    with pytest.raises(UserError, match=f"^{folder}/{A}: missing; restore"):
        SpanReader(open_storage(folder), None, FINGERPRINT).read([span(A, 0, 10)])


def test_a_span_beyond_the_end(folder: Path) -> None:
    with pytest.raises(UserError, match=f"^{folder}/{A}: ends before offset 10001"):
        SpanReader(open_storage(folder), None, FINGERPRINT).read([span(A, 9_991, 10)])


def test_a_flipped_byte_does_not_reach_the_reader(server: FileServer, cache: ShardCache) -> None:
    server.faults[A].extend([FLIP] * 100)
    with pytest.raises(UserError, match=f"{A}: downloaded 3 times, its xxh3-128 is"):
        SpanReader(open_storage(server.url, QUICK), cache, FINGERPRINT).read([span(A, 0, 10)])
