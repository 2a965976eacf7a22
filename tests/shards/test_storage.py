"""Storage: the same bytes from a folder, S3 and HTTP; what may pass is tried again, what will not is said at once."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from nsi.errors import UserError
from shards.reading.remote import CONCURRENT
from shards.reading.storage import Retries, Storage, open_storage
from tests.shards.servers import CUT, HOLD, QUICK, RESET, FileServer, file_server, s3_environment, s3_server

ROOT = Path(__file__).parents[2]
FILES = {
    "manifest.json": b'{"format": 1}',
    "train-000000.tar": random.Random(0).randbytes(3_000_000),  # more than a piece
    "train-000001.tar": random.Random(1).randbytes(100_000),
}
TAR = "train-000001.tar"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as server:
        server.files.update(FILES)
        yield server


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server() as client:
        client.create_bucket(Bucket="data")
        for name, data in FILES.items():
            client.put_object(Bucket="data", Key=f"sets/one/{name}", Body=data)
        client.put_object(Bucket="data", Key="sets/one/deeper/other.tar", Body=b"none of it")
        yield client


@pytest.fixture(params=["local", "http", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return open_storage("s3://data/sets/one/", QUICK)
    if request.param == "http":
        return open_storage(request.getfixturevalue("server").url, QUICK)
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return open_storage(folder, QUICK)


def run(script: str, *arguments: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


# --- the same from everywhere


def test_read(storage: Storage) -> None:
    assert {name: storage.read(name) for name in FILES} == FILES


def test_read_ranges(storage: Storage) -> None:
    random_ = random.Random(2)
    requests = []
    for _ in range(60):
        name = random_.choice(list(FILES))
        offset = random_.randrange(len(FILES[name]))
        requests.append((name, offset, random_.randrange(len(FILES[name]) - offset + 1)))
    requests += [(TAR, 0, len(FILES[TAR])), (TAR, 5, 0)]
    found = storage.read_ranges(requests)
    assert found == [FILES[name][offset : offset + size] for name, offset, size in requests]
    assert storage.read_ranges([]) == []


@pytest.mark.parametrize(("offset", "size"), [(99_990, 11), (100_000, 1), (200_000, 10)])
def test_a_range_beyond_the_end(storage: Storage, offset: int, size: int) -> None:
    with pytest.raises(UserError, match=TAR) as error:
        storage.read_ranges([(TAR, 0, 10), (TAR, offset, size)])
    assert "\n" not in str(error.value)


def test_fetch(storage: Storage, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.write_bytes(b"x" * 5_000_000)  # what was there goes
    assert storage.fetch("train-000000.tar", target) == xxhash.xxh3_128_hexdigest(FILES["train-000000.tar"])
    assert target.read_bytes() == FILES["train-000000.tar"]


def test_sizes(storage: Storage) -> None:
    expected = {name: len(data) for name, data in FILES.items()}
    assert storage.sizes() == (None if storage.location.startswith("http") else expected)


def test_missing(storage: Storage, tmp_path: Path) -> None:
    for ask in (
        lambda: storage.read("none.tar"),
        lambda: storage.fetch("none.tar", tmp_path / "copy"),
        lambda: storage.read_ranges([("none.tar", 0, 10)]),
    ):
        with pytest.raises(UserError, match=f"^{storage.location}/none.tar.*: (missing|not found)") as error:
            ask()
        assert "\n" not in str(error.value)


def test_in_another_process(storage: Storage) -> None:
    storage.read("manifest.json")  # connected here
    script = (
        "import pickle, sys; storage = pickle.loads(bytes.fromhex(sys.argv[1]));"
        f"print(storage.read_ranges([({TAR!r}, 7, 9)])[0].hex(), storage.retries.limit)"
    )
    found = run(script, pickle.dumps(storage).hex())
    assert found.split() == [FILES[TAR][7:16].hex(), str(QUICK.limit)]


def test_after_a_fork(storage: Storage) -> None:
    script = """if True:
        import gc, os, sys
        from shards.reading.storage import Retries, open_storage
        storage = open_storage(sys.argv[1], Retries(limit=1, timeout_s=20))
        requests = [("manifest.json", 0, 9)] * 20
        first = storage.read_ranges(requests)
        child = os.fork()
        if child == 0:
            same = storage.read_ranges(requests) == first
            del storage
            gc.collect()  # must not close the parent's connections
            os._exit(0 if same else 1)
        status = os.waitpid(child, 0)[1]
        print(status, [storage.read_ranges(requests) == first for _ in range(3)])
    """
    assert run(script, storage.location) == "0 [True, True, True]\n"


def test_a_full_disk_is_no_failing_network(storage: Storage) -> None:
    with pytest.raises(UserError, match="^/dev/full: cannot be written .No space left on device"):
        storage.fetch(TAR, Path("/dev/full"))


def test_a_folder_that_is_not_there(storage: Storage, tmp_path: Path) -> None:
    target = tmp_path / "none" / "copy"
    with pytest.raises(UserError, match=f"^{target}: cannot be written .No such file or directory"):
        storage.fetch(TAR, target)


# --- locations


def test_where_things_are() -> None:
    assert open_storage("a/b").path("x.tar") == Path("a/b/x.tar")
    assert open_storage(Path("/a/b")).is_local
    assert open_storage("s3://data/sets/one/").where("x.tar") == "s3://data/sets/one/x.tar"
    assert not open_storage("https://host/x").is_local
    for location in ("gs://data", "s3://", "http:///"):
        with pytest.raises(UserError, match=f"^{location}: not a place for shards"):
            open_storage(location)


def test_a_folder_pays_for_no_network(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"x")
    script = (
        "import sys, shards.reading.reader; from shards.reading.storage import open_storage;"
        "open_storage(sys.argv[1]).read('manifest.json');"
        "print(*{'fsspec', 'aiohttp', 'botocore', 's3fs', 'torch', 'asyncio'} & set(sys.modules))"
    )
    assert run(script, str(tmp_path)) == "\n"


# --- servers that fail


@pytest.fixture(params=["http", "s3"])
def flaky(request: pytest.FixtureRequest, server: FileServer) -> Iterator[tuple[FileServer, str]]:
    """The failing server and its location, spoken to as HTTP or as S3."""
    if request.param == "http":
        yield server, server.url
    else:
        server.files = {f"data/{name}": data for name, data in FILES.items()}
        with s3_environment(server.url):
            yield server, "s3://data"


def name_at(location: str, name: str) -> str:
    return f"data/{name}" if location.startswith("s3") else name


def test_connections_are_kept(flaky: tuple[FileServer, str]) -> None:
    server, location = flaky
    for _ in range(5):
        assert open_storage(location, QUICK).read(TAR) == FILES[TAR]
    assert len(server.connections) == 1


@pytest.mark.parametrize("fault", [500, 503, 429, CUT, RESET])
def test_what_passes_is_tried_again(flaky: tuple[FileServer, str], fault: int | str, tmp_path: Path) -> None:
    server, location = flaky
    storage, asked_for = open_storage(location, QUICK), name_at(location, TAR)
    target = tmp_path / "copy"
    for number, ask in enumerate(
        (
            lambda: storage.read(TAR) == FILES[TAR],
            lambda: storage.read_ranges([(TAR, 10, 90)]) == [FILES[TAR][10:100]],
            lambda: storage.fetch(TAR, target) and target.read_bytes() == FILES[TAR],
        ),
        start=1,
    ):
        server.faults[asked_for].extend([fault] * (QUICK.limit - 1))
        assert ask()
        assert server.asked(asked_for) == number * QUICK.limit


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (500, "HTTP 500", 1),
        (503, "HTTP 503", 1),
        (CUT, "(?i)payload|incomplete|length", 1),
        (RESET, "(?i)connect|reset|closed", 2),  # aiohttp makes a broken connection anew, once, by itself
    ],
)
def test_the_limit(flaky: tuple[FileServer, str], fault: int | str, reason: str, requests: int) -> None:
    server, location = flaky
    asked_for = name_at(location, TAR)
    server.faults[asked_for].extend([fault] * 100)
    with pytest.raises(UserError, match=f"^{location}/{TAR}: cannot be read, tried 3 times .the last: ") as error:
        open_storage(location, QUICK).read(TAR)
    assert server.asked(asked_for) == QUICK.limit * requests
    assert error.match(reason)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "message"), [(403, "access denied"), (401, "access denied"), (404, "not found"), (400, "refused")]
)
def test_what_will_not_pass_is_said_at_once(flaky: tuple[FileServer, str], status: int, message: str) -> None:
    server, location = flaky
    asked_for = name_at(location, TAR)
    server.faults[asked_for].append(status)
    with pytest.raises(UserError, match=f"^{location}/{TAR}: {message} .HTTP {status}") as error:
        open_storage(location, QUICK).read(TAR)
    assert server.asked(asked_for) == 1
    assert "\n" not in str(error.value)


def test_a_server_that_stalls(flaky: tuple[FileServer, str]) -> None:
    server, location = flaky
    asked_for = name_at(location, TAR)
    server.faults[asked_for].append(HOLD)
    assert open_storage(location, Retries(limit=20, first_wait_s=0.001, timeout_s=0.3)).read(TAR) == FILES[TAR]
    assert server.asked(asked_for) >= 2
    server.faults[asked_for].extend([HOLD] * 100)
    with pytest.raises(UserError, match="tried 2 times .the last: timed out"):
        open_storage(location, Retries(limit=2, first_wait_s=0.001, timeout_s=0.3)).read(TAR)


def test_nobody_there(server: FileServer) -> None:
    with file_server() as gone:
        url = gone.url
    with pytest.raises(UserError, match=f"^{url}/{TAR}: cannot be read, tried 3 times"):
        open_storage(url, QUICK).read(TAR)
    with s3_environment(url), pytest.raises(UserError, match=f"^s3://data/{TAR}: cannot be read, tried 3 times"):
        open_storage("s3://data", QUICK).read(TAR)


def test_one_range_that_fails_takes_the_others_with_it(server: FileServer) -> None:
    server.faults[TAR].append(403)
    server.faults["train-000000.tar"].extend([HOLD] * 500)  # would be waited for until the end of the test
    with pytest.raises(UserError, match="offset 0, 10 bytes.: access denied"):
        open_storage(server.url, QUICK).read_ranges([(TAR, 0, 10), *[("train-000000.tar", i, 10) for i in range(500)]])
    server.go_on.set()
    for _ in range(20):  # time in which the others would go on
        open_storage(server.url, QUICK).read("manifest.json")
    assert server.asked("train-000000.tar") < CONCURRENT


def test_ranges_are_read_at_the_same_time(server: FileServer) -> None:
    server.faults[TAR].extend([HOLD] * 7)
    storage = open_storage(server.url, QUICK)
    # Seven are held until the last of all has been answered: one after the other would wait for ever.
    server.files["last"] = b"x"

    def release() -> None:
        storage_of_thread = open_storage(server.url, QUICK)
        while server.most_together < 7:
            storage_of_thread.read("last")
        server.go_on.set()

    thread = threading.Thread(target=release)
    thread.start()
    assert storage.read_ranges([(TAR, i, 10) for i in range(7)]) == [FILES[TAR][i : i + 10] for i in range(7)]
    thread.join()


def test_a_server_without_ranges(server: FileServer) -> None:
    server.serves_ranges = False
    storage = open_storage(server.url, QUICK)
    with pytest.raises(UserError, match=f"{TAR}: its server does not serve ranges of bytes; use a cache"):
        storage.read_ranges([(TAR, 0, 10)])
    assert server.asked(TAR) == 1


# --- S3 itself


def test_no_such_bucket(s3: Any) -> None:
    storage = open_storage("s3://none-such/sets", QUICK)
    with pytest.raises(UserError, match=f"^s3://none-such/sets/{TAR}: not found .HTTP 404 NoSuchBucket"):
        storage.read(TAR)
    with pytest.raises(UserError, match="^s3://none-such/sets: not found"):
        storage.sizes()


def test_no_such_prefix(s3: Any) -> None:
    with pytest.raises(UserError, match="^s3://data/none: not found"):
        open_storage("s3://data/none", QUICK).sizes()


def test_a_whole_bucket(s3: Any) -> None:
    s3.create_bucket(Bucket="flat")
    s3.put_object(Bucket="flat", Key=TAR, Body=b"abc")
    storage = open_storage("s3://flat", QUICK)
    assert storage.sizes() == {TAR: 3}
    assert storage.read(TAR) == b"abc"


def test_no_credentials(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_environment(server.url):
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(UserError, match=f"^s3://data/{TAR}: .*credentials; set the AWS_"):
            open_storage("s3://data", QUICK).read(TAR)
    assert not server.requests


def test_waits_double_up_to_a_limit() -> None:
    assert [Retries().wait_s(tried) for tried in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert Retries().wait_s(50) == 30.0
