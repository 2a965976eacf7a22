"""The cache of a node: one download a shard however many want it, nothing unverified, never above its limit."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from nsi.errors import UserError
from shards.reading.cache import ShardCache
from shards.reading.storage import Storage, open_storage
from tests.shards.servers import CUT, FLIP, HOLD, QUICK, FileServer, file_server

ROOT = Path(__file__).parents[2]
FINGERPRINT = "0123456789abcdef" * 4
SHARD = 10_000
FILES = {f"train-{i:06d}.tar": random.Random(i).randbytes(SHARD) for i in range(6)}
A, B, C, D, *_ = FILES

WORKER = """if True:
    import sys
    from pathlib import Path
    from shards.reading.cache import ShardCache
    from shards.reading.storage import Retries, open_storage
    url, folder, limit, fingerprint, name, size, xxh3_128 = sys.argv[1:]
    storage = open_storage(url, Retries(limit=3, first_wait_s=0.001, timeout_s=60))
    print(ShardCache(Path(folder), int(limit)).get(storage, fingerprint, name, int(size), xxh3_128))
"""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as server:
        server.files.update(FILES)
        yield server


@pytest.fixture
def storage(server: FileServer) -> Storage:
    return open_storage(server.url, QUICK)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 3 * SHARD)


def checksum(name: str) -> str:
    return xxhash.xxh3_128_hexdigest(FILES[name])


def get(cache: ShardCache, storage: Storage, name: str) -> Path:
    return cache.get(storage, FINGERPRINT, name, SHARD, checksum(name))


def get_if_free(cache: ShardCache, storage: Storage, name: str) -> Path | None:
    return cache.get_if_free(storage, FINGERPRINT, name, SHARD, checksum(name))


def copies(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.glob("*/*.tar"))


def leftovers(cache: ShardCache) -> list[Path]:
    return list(cache.folder.glob("*/*.part"))


def in_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def start_process(cache: ShardCache, storage: Storage, name: str) -> subprocess.Popen:
    arguments = [storage.location, cache.folder, cache.limit_bytes, FINGERPRINT, name, SHARD, checksum(name)]
    command = [sys.executable, "-c", WORKER, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_waiters(cache: ShardCache, name: str, number: int) -> None:
    """Returns once so many processes wait for a shard's lock, as the kernel says."""
    inode = (cache.folder / FINGERPRINT[:16] / f"{name}.lock").stat().st_ino
    deadline = time.monotonic() + 60
    while sum("->" in line and f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines()) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- a copy


def test_a_hit_asks_nobody(cache: ShardCache, storage: Storage, server: FileServer) -> None:
    path = get(cache, storage, A)
    assert path == cache.folder / FINGERPRINT[:16] / A
    assert path.read_bytes() == FILES[A]
    assert get(cache, storage, A) == get_if_free(cache, storage, A) == path
    assert server.asked(A) == 1


def test_data_sets_do_not_mix(cache: ShardCache, storage: Storage, server: FileServer) -> None:
    first = get(cache, storage, A)
    server.files[A] = FILES[B]
    second = cache.get(storage, "f" * 64, A, SHARD, checksum(B))
    assert (first.read_bytes(), second.read_bytes()) == (FILES[A], FILES[B])


def test_a_copy_that_was_cut_is_replaced(cache: ShardCache, storage: Storage) -> None:
    path = get(cache, storage, A)
    os.truncate(path, 10)
    assert get(cache, storage, A).read_bytes() == FILES[A]


@pytest.mark.parametrize("name", ["../x.tar", "/x.tar", "..", ""])
def test_a_name_that_leads_out(cache: ShardCache, storage: Storage, name: str) -> None:
    with pytest.raises(UserError, match="not a name that a cache can keep"):
        cache.get(storage, FINGERPRINT, name, SHARD, "")


def test_a_folder_that_cannot_be(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/cache: the cache cannot be used"):
        get(ShardCache(tmp_path / "file" / "cache", SHARD), storage, A)


# --- corrupted on the way


@pytest.mark.parametrize("fault", [FLIP, CUT, 503])
def test_a_download_that_was_damaged_is_made_again(
    cache: ShardCache, storage: Storage, server: FileServer, fault: int | str
) -> None:
    server.faults[A].extend([fault] * (QUICK.limit - 1))
    assert get(cache, storage, A).read_bytes() == FILES[A]
    assert server.asked(A) == QUICK.limit


def test_a_flipped_byte_in_the_servers_copy(cache: ShardCache, storage: Storage, server: FileServer) -> None:
    server.faults[A].extend([FLIP] * QUICK.limit)
    with pytest.raises(UserError, match=f"^{storage.location}/{A}: downloaded 3 times, its xxh3-128 is ") as error:
        get(cache, storage, A)
    assert f"the manifest says {checksum(A)[:12]}" in str(error.value)
    assert server.asked(A) == QUICK.limit
    assert copies(cache) == []
    assert leftovers(cache) == []
    assert get(cache, storage, A).read_bytes() == FILES[A]  # once it was copied there again


def test_a_shard_of_another_size(cache: ShardCache, storage: Storage, server: FileServer) -> None:
    server.files[A] = FILES[A][:-1]
    with pytest.raises(UserError, match=f"{A}: downloaded 3 times"):
        get(cache, storage, A)


def test_a_missing_shard(cache: ShardCache, storage: Storage, server: FileServer) -> None:
    del server.files[A]
    with pytest.raises(UserError, match=f"^{storage.location}/{A}: not found"):
        get(cache, storage, A)
    assert server.asked(A) == 1
    assert leftovers(cache) == []


# --- room


def test_what_was_used_longest_ago_goes_first(cache: ShardCache, storage: Storage) -> None:
    for name in (A, B, C, A, D):
        get(cache, storage, name)
    assert copies(cache) == [A, C, D]
    get(cache, storage, B)
    assert copies(cache) == [A, B, D]


def test_an_older_data_set_goes_too(cache: ShardCache, storage: Storage) -> None:
    old = cache.get(storage, "f" * 64, A, SHARD, checksum(A))
    for name in (B, C, D):
        get(cache, storage, name)
    assert not old.exists()


def test_an_evicted_copy_stays_good_where_it_is_mapped(cache: ShardCache, storage: Storage) -> None:
    path = get(cache, storage, A)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name in (B, C, D):
        get(cache, storage, name)
    assert not path.exists()
    assert mapped[:] == FILES[A]


def test_a_limit_below_one_shard(storage: Storage, tmp_path: Path, server: FileServer) -> None:
    with pytest.raises(UserError, match=f"a cache of {SHARD - 1} bytes cannot hold {A}, of {SHARD}; raise"):
        get(ShardCache(tmp_path, SHARD - 1), storage, A)
    assert not server.requests
    assert get(ShardCache(tmp_path, SHARD), storage, A).exists()


def test_a_copy_that_goes_while_room_is_made_is_no_error(cache: ShardCache, storage: Storage) -> None:
    """Its name was listed, and whoever found it damaged has removed it since."""
    copy = get(cache, storage, A)
    copy.unlink()
    copy.symlink_to("nowhere")
    assert get(cache, storage, B).exists()


def test_other_peoples_files_stay(cache: ShardCache, storage: Storage) -> None:
    theirs = [cache.folder / "scene.png", cache.folder / "mine" / A, cache.folder / FINGERPRINT[:16] / "notes.txt"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10 * SHARD)
    for name in FILES:
        get(cache, storage, name)
    assert all(path.exists() for path in theirs)
    assert len(copies(cache)) == 4  # three, and theirs


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=5, max_size=5),
    limit=st.integers(60, 150),
    order=st.lists(st.integers(0, 4), max_size=20),
)
def test_the_limit_holds(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, order: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    for shard, size in enumerate(sizes):
        (folder / f"{shard}.tar").write_bytes(bytes([shard]) * size)
    storage, cache = open_storage(folder, QUICK), ShardCache(folder / "cache", limit)
    kept: list[int] = []  # the least recently used first
    for shard in order:
        data = bytes([shard]) * sizes[shard]
        path = cache.get(storage, FINGERPRINT, f"{shard}.tar", len(data), xxhash.xxh3_128_hexdigest(data))
        assert path.read_bytes() == data
        if shard in kept:
            kept.remove(shard)
        while sum(sizes[other] for other in kept) + sizes[shard] > limit:
            kept.pop(0)
        kept.append(shard)
        assert copies(cache) == sorted(f"{other}.tar" for other in kept)


def test_a_full_disk(storage: Storage, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        cache = ShardCache(disk, 10 * SHARD)
        get(cache, storage, A)
        with pytest.raises(UserError, match=f"^{disk}.*No space left on device") as error:
            get(cache, storage, B)
        assert "\n" not in str(error.value)
        assert leftovers(cache) == []
        assert get(cache, storage, A).read_bytes() == FILES[A]
    finally:
        subprocess.run(["umount", disk], check=True)


# --- many at once


def test_racing_processes_download_once(cache: ShardCache, storage: Storage, server: FileServer) -> None:
    server.faults[A].append(HOLD)
    processes = [start_process(cache, storage, A) for _ in range(4)]
    assert server.holding.wait(60)
    wait_for_waiters(cache, A, 3)
    server.go_on.set()
    path = str(cache.folder / FINGERPRINT[:16] / A)
    assert [process.communicate(timeout=60) for process in processes] == [(f"{path}\n", "")] * 4
    assert server.asked(A) == 1
    assert Path(path).read_bytes() == FILES[A]


def test_a_process_killed_midway(storage: Storage, server: FileServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", SHARD)  # what the dead one had reserved is needed
    server.faults[A].append(HOLD)
    killed = start_process(cache, storage, A)
    assert server.holding.wait(60)
    waiting = start_process(cache, storage, A)
    wait_for_waiters(cache, A, 1)
    assert len(leftovers(cache)) == 1
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    path = cache.folder / FINGERPRINT[:16] / A
    assert waiting.communicate(timeout=60) == (f"{path}\n", "")  # started over, without the first one's answer
    assert server.asked(A) == 2
    assert path.read_bytes() == FILES[A]
    assert leftovers(cache) == []
    killed.communicate()


def test_what_the_dead_reserved_is_free(storage: Storage, server: FileServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SHARD)
    server.faults[A].append(HOLD)
    killed = start_process(cache, storage, A)
    assert server.holding.wait(60)
    assert get_if_free(cache, storage, B) is None  # all room is A's
    killed.kill()
    killed.communicate()
    assert get_if_free(cache, storage, B) is not None
    assert copies(cache) == [B]
    assert leftovers(cache) == []


def test_ahead_of_need_waits_for_nobody(cache: ShardCache, storage: Storage, server: FileServer) -> None:
    server.faults[A].append(HOLD)
    thread = in_thread(lambda: get(cache, storage, A))
    assert server.holding.wait(60)
    assert get_if_free(cache, storage, A) is None
    assert get_if_free(cache, storage, B) is not None
    server.go_on.set()
    thread.join()
    assert get_if_free(cache, storage, A) is not None
    assert server.asked(A) == 1


def test_room_is_waited_for(storage: Storage, server: FileServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SHARD)
    server.faults[A].append(HOLD)
    first = in_thread(lambda: get(cache, storage, A))
    assert server.holding.wait(60)
    second = in_thread(lambda: get(cache, storage, B))
    assert get_if_free(cache, storage, C) is None
    assert server.asked(B) == 0
    server.go_on.set()
    first.join()
    second.join()
    assert copies(cache) == [B]


def test_many_threads_stay_within_the_limit(cache: ShardCache, storage: Storage) -> None:
    above = []

    def work(seed: int) -> None:
        for name in random.Random(seed).choices(list(FILES), k=15):
            get(cache, storage, name)
            used = occupied(cache)
            if used > cache.limit_bytes:
                above.append(used)

    threads = [in_thread(lambda seed=seed: work(seed)) for seed in range(5)]
    for thread in threads:
        thread.join()
    assert not above
    assert leftovers(cache) == []
    for path in cache.folder.glob("*/*.tar"):
        assert path.read_bytes() == FILES[path.name]


def occupied(cache: ShardCache) -> int:
    """Bytes of all copies and of downloads under way, at one instant: nothing comes or is evicted under this lock."""
    with (cache.folder / "room.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return SHARD * (len(copies(cache)) + len(leftovers(cache)))
