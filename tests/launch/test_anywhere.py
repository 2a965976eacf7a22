"""Shards in a folder, behind http:// or s3://, by ranges or through a cache: the same training, and the same verbs."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.runfolder import read_lines
from shards.reading.cache import ShardCache
from shards.reading.dataset import open_split
from tests.launch.outside import done, nsi, refused
from tests.launch.test_training import BIN, ROOT, SMALL, call, environment, losses, one_line
from tests.shards.servers import CUT, RESET, FileServer, file_server, s3_server

TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "launch/train.py")
ALONE = (sys.executable, "-m", "launch", "train")


@pytest.fixture(scope="module", autouse=True)
def _no_proxy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield


@pytest.fixture
def web(shards: Path) -> Iterator[FileServer]:
    """A web server that has the shards under /data."""
    with file_server() as server:
        server.files = {f"data/{path.name}": path.read_bytes() for path in shards.iterdir()}
        yield server


@pytest.fixture(scope="module")
def s3(shards: Path) -> Iterator[Any]:
    """An S3 server that has the shards in s3://bucket/data."""
    with s3_server() as client:
        client.create_bucket(Bucket="bucket")
        for path in shards.iterdir():
            client.put_object(Bucket="bucket", Key=f"data/{path.name}", Body=path.read_bytes())
        yield client


@pytest.fixture(scope="module")
def at_home(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the shards in their folder, evaluated."""
    run = tmp_path_factory.mktemp("runs") / "home"
    trained(train(shards, run))
    done(nsi("eval", run))
    return run


def train(place: object, run: Path, *more: str, start: tuple[str, ...] = ALONE) -> subprocess.CompletedProcess:
    return call(*start, "--data_path", str(place), "--log_path", str(run), *SMALL, *more)


def trained(found: subprocess.CompletedProcess) -> None:
    assert found.returncode == 0, found.stdout + found.stderr


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval-test.json").read_text())


def tars(folder: Path) -> dict[str, bytes]:
    """The tars that training reads."""
    return {path.name: path.read_bytes() for path in folder.glob("*.tar") if not path.name.startswith("test-")}


def located(shards: Path, split: str) -> list[Any]:
    """Where all samples of a split lie."""
    found = open_split(shards, split)
    return found.locate(range(len(found)))


def copies(cache: Path) -> dict[str, bytes]:
    """The shards that a cache holds."""
    return {path.name: path.read_bytes() for path in cache.glob("*/*.tar")}


# --- training ---


@pytest.mark.slow
def test_a_web_server_by_ranges(web: FileServer, shards: Path, at_home: Path, tmp_path: Path) -> None:
    """A server, moreover, that is not always well."""
    for name, fault in (("train-000001.tar", CUT), ("train-000002.tar", RESET), ("train-000003.tar", 503)):
        web.faults[f"data/{name}"].append(fault)
    trained(train(f"{web.url}/data", tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(at_home)
    assert not any(web.faults.values())
    asked = {(name.removeprefix("data/"), span) for name, span in web.requests if name.endswith(".tar")}
    samples = [sample for name in ("train", "val") for sample in located(shards, name)]
    assert asked == {  # a request a sample, and no more of the tars than that
        (span.shard, f"bytes={span.offset}-{span.offset + span.size - 1}") for span in (each.span for each in samples)
    }
    done(nsi("eval", tmp_path / "run"))
    assert evaluation(tmp_path / "run") == evaluation(at_home)
    assert "proven: every sample was read exactly once an epoch" in done(nsi("audit", tmp_path / "run"))


@pytest.mark.slow
def test_a_web_server_through_a_cache(web: FileServer, shards: Path, at_home: Path, tmp_path: Path) -> None:
    web.serves_ranges = False
    trained(train(f"{web.url}/data", tmp_path / "run", "--cache_path", str(tmp_path / "cache")))
    assert losses(tmp_path / "run") == losses(at_home)
    assert {name: web.asked(f"data/{name}") for name in tars(shards)} == dict.fromkeys(tars(shards), 1)
    assert copies(tmp_path / "cache") == tars(shards)


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("how", ["ranges", "cache"])
def test_s3(shards: Path, at_home: Path, tmp_path: Path, how: str) -> None:
    cache = ["--cache_path", str(tmp_path / "cache")] if how == "cache" else []
    trained(train("s3://bucket/data", tmp_path / "run", *cache))
    assert losses(tmp_path / "run") == losses(at_home)
    assert copies(tmp_path / "cache") == (tars(shards) if cache else {})
    done(nsi("eval", tmp_path / "run"))
    assert evaluation(tmp_path / "run") == evaluation(at_home)
    assert "proven: every sample was read exactly once an epoch" in done(nsi("audit", tmp_path / "run"))


@pytest.mark.slow
def test_two_ranks_share_a_cache(web: FileServer, shards: Path, at_home: Path, tmp_path: Path) -> None:
    cache = ["--cache_path", str(tmp_path / "cache")]
    trained(train(f"{web.url}/data", tmp_path / "run", *cache, start=TORCHRUN))
    assert losses(tmp_path / "run") == pytest.approx(losses(at_home), rel=1e-4)
    assert {line["world_size"] for line in read_lines(tmp_path / "run", "metrics.jsonl")} == {2}
    assert {name: web.asked(f"data/{name}") for name in tars(shards)} == dict.fromkeys(tars(shards), 1)
    assert copies(tmp_path / "cache") == tars(shards)


@pytest.mark.slow
def test_a_shared_file_system_through_a_cache(shards: Path, at_home: Path, tmp_path: Path) -> None:
    """Copies in the cache are what is read: the folder's own tars are damaged, but for those not copied yet."""
    folder, cache = Path(shutil.copytree(shards, tmp_path / "folder")), ShardCache(tmp_path / "cache", 10**9)
    split = open_split(folder, "train")
    copied = list(split.table)[1:]
    for shard in copied:
        cache.get(split.storage, split.manifest.fingerprint, shard.name, shard.bytes, shard.xxh3_128)
        (folder / shard.name).write_bytes(bytes(shard.bytes))
    trained(train(folder, tmp_path / "run", "--cache_path", str(cache.folder)))
    assert losses(tmp_path / "run") == losses(at_home)
    assert copies(cache.folder) == tars(shards)


# --- other verbs ---


@pytest.mark.usefixtures("s3")
def test_verify_and_plan(web: FileServer, shards: Path) -> None:
    plans = []
    for place in (str(shards), f"{web.url}/data", "s3://bucket/data"):
        assert f"{place}: 60 samples, all as they were written" in done(nsi("verify", place, "--workers", 1))
        plan = json.loads(done(nsi("plan", place, "--json", "--ranks", 8, "--batch_size", 12)))
        plans.append({name: plan[name] for name in ("split", "length")})
        assert f"train of {place}" in done(nsi("plan", place))
    assert plans[0] == plans[1] == plans[2]


def test_a_flipped_byte_on_the_server_is_found(web: FileServer, shards: Path) -> None:
    sample = flip(web, shards)
    said = nsi("verify", f"{web.url}/data", "--workers", 1)
    where = f"{web.url}/data/{sample.span.shard}"
    assert f"{where}: image of {sample.key} at offset {sample.image.offset} does not have its checksum" in said.out
    assert "2 faults; restore what is named above" in refused(said)


def flip(web: FileServer, shards: Path) -> Any:
    """Flips a byte of one training image on a server. Returns the sample."""
    sample = located(shards, "train")[25]
    data = bytearray(web.files[f"data/{sample.span.shard}"])
    data[sample.image.offset + 50] ^= 4
    web.files[f"data/{sample.span.shard}"] = bytes(data)
    return sample


# --- what goes wrong ---


@pytest.mark.slow
def test_training_stops_at_a_flipped_byte(web: FileServer, shards: Path, tmp_path: Path) -> None:
    sample = flip(web, shards)
    said = one_line(train(f"{web.url}/data", tmp_path / "run"))
    assert f"{web.url}/data/{sample.span.shard}: image of {sample.key} at offset {sample.image.offset} does not" in said


def test_a_cache_too_small_for_one_shard(web: FileServer, tmp_path: Path) -> None:
    """Said before a step is done, and before anything is downloaded."""
    small = ["--cache_path", str(tmp_path / "cache"), "--cache_gb", "0.00001"]
    said = one_line(train(f"{web.url}/data", tmp_path / "run", *small))
    assert re.search(r"cache: a cache of 10000 bytes cannot hold train-00000\d\.tar, of \d+; raise its limit", said)
    assert web.requests == [("data/manifest.json", None)]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_server_without_ranges(web: FileServer, tmp_path: Path) -> None:
    web.serves_ranges = False
    said = one_line(train(f"{web.url}/data", tmp_path / "run"))
    assert "its server does not serve ranges of bytes; use a cache, or another server" in said


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket(tmp_path: Path) -> None:
    lines = [refused(nsi(verb, "s3://no-such-bucket/data")) for verb in ("verify", "plan")]
    lines.append(one_line(train("s3://no-such-bucket/data", tmp_path / "run")))
    for line in lines:
        assert "s3://no-such-bucket/data/manifest.json: not found (HTTP 404 NoSuchBucket" in line
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_in_a_bucket(s3: Any, shards: Path, tmp_path: Path) -> None:
    """Said before a step is done, since S3 can list."""
    for path in shards.iterdir():
        if path.name != "train-000003.tar":
            s3.put_object(Bucket="bucket", Key=f"torn/{path.name}", Body=path.read_bytes())
    said = one_line(train("s3://bucket/torn", tmp_path / "run"))
    assert "s3://bucket/torn/train-000003.tar: missing; restore it" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_server_that_cannot_be_reached(at_home: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there, and nobody else can
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/data"
        verbs = [
            ["train", "--data_path", url, "--log_path", str(tmp_path / "run"), *SMALL],
            ["verify", url],
            ["plan", url],
            ["audit", str(at_home), "--data_path", url],
            ["eval", str(at_home), "--data_path", url],
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "launch", *verb], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
            )
            for verb in verbs
        ]
        said = [process.communicate(timeout=120)[1] for process in processes]
    for verb, process, text in zip(verbs, processes, said, strict=True):
        assert process.returncode == 1, text
        assert text.startswith(f"nsi {verb[0]}: {url}/manifest.json: cannot be read, tried 5 times"), text
        assert text.count("\n") == 1
    assert not (tmp_path / "run").exists()
