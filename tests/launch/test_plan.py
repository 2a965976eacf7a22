"""`nsi plan`: what it prints, what it refuses, and that a world of thousands is planned in a second or two."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from launch import cli
from launch.plan import PlanConfig
from nsi.schema import Vocabulary
from shards.manifest import Manifest, ShardTable, write_manifest


def write(folder: Path, samples_S: np.ndarray, bytes_S: np.ndarray, split: str = "train") -> None:
    """The manifest of shards that were never written."""
    checksums = [
        np.random.default_rng(0).integers(0, 256, (len(samples_S), width), dtype=np.uint8) for width in (16, 32)
    ]
    table = ShardTable(split, samples_S.astype(np.int64), bytes_S.astype(np.int64), *checksums)
    vocabulary = Vocabulary((), (), ())
    write_manifest(folder, Manifest("full", (320, 240), None, 10, "none", "official", "", vocabulary, {split: table}))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """100 shards of 500 samples of 120 KB, by a path that is the same everywhere."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write(Path("data"), np.full(100, 500), np.full(100, 60_000_000))
    return "data"


def status(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(["plan", *arguments])
    return code, out.getvalue(), err.getvalue()


GOLDEN = """\
data          train of data: 100 shards, 50,000 samples, 6 GB; the manifest 11.6 KB, indexes about 4.83 MB
              bytes below are at most: training reads no masks, but the manifest knows whole shards only
world         32 ranks on 4 nodes; a batch of 1,000 samples is 32 rows on 8 ranks, 31 on 24, 24 masked
length        an epoch is 50,000/1,000 = 50 steps; the run has 15,000 steps, 300 epochs
ranged reads  an epoch: 1,600 samples (192 MB) a rank, 12,500 samples (1.5 GB) a node, 6 GB all nodes together
node cache    an epoch: 6 GB a node, 24 GB all nodes together, as each takes samples from every shard
              it needs 3.84 GB a node for the block that is read and the next, and fetches anew each epoch
              it needs 6 GB a node to hold the split, and fetches it once
indexes       once, either way: about 4.83 MB (100 shards) a rank, 38.7 MB a node
open files    a batch reaches into at most 64 shards, a rank's rows into at most 32; a worker keeps at most 64 open
first batch   ranged reads: about 0.474 s (opening 0.342 s, reading 0.11 s, decoding 0.0216 s)
              node cache: about 2.77 s (opening 0.342 s, reading 2.41 s, decoding 0.0216 s)
data rate     at most 10,077 images/s with ranged reads, 8,333 while a cache is filled, 47,360 from a full one
              decoding alone does 47,360
              20,000 images/s take 600 MB/s a node with ranged reads, 2,400 to fill a cache; the storage gives 1,000
memory        4.85 MB a rank: manifest 6.4 KB, order 8.9 KB, indexes 4.83 MB; 38.8 MB a node; batches on top
caution       with ranged reads training will wait for data: 20,000 images/s wanted, 10,077 come
              while a cache is filled training will wait for data: 20,000 images/s wanted, 8,333 come
"""


def test_what_it_says(small: str) -> None:
    given = "--ranks 32 --nodes 4 --batch_size 1000 --num_workers 4 --images_per_second 20000"
    code, out, err = status(small, *given.split())
    assert (code, err) == (0, "")
    assert out == GOLDEN


def test_json_says_the_same(small: str) -> None:
    code, out, _ = status(small, "--ranks", "32", "--nodes", "4", "--batch_size", "1024", "--json")
    content = json.loads(out)
    assert code == 0
    assert content["split"] == "train"
    assert content["data"]["samples"] == 50_000
    assert content["data"]["manifest_bytes"] == (Path(small) / "manifest.json").stat().st_size
    assert content["length"] == {
        "steps_an_epoch": 48.828125,
        "steps_an_epoch_exactly": "3125/64",
        "steps": 14649,
        "epochs": pytest.approx(300.01152),
    }
    assert content["node"]["bytes_an_epoch_at_most"] == 1_500_000_000
    assert content["wanted"] is None
    assert content["cautions"] == []


def test_shards_on_a_server(small: str) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            code, out, err = status(f"http://127.0.0.1:{server.server_port}/{small}", "--json")
        finally:
            server.shutdown()
    assert (code, err) == (0, "")
    there, here = json.loads(out), json.loads(status(small, "--json")[1])
    assert (there["data"], there["cache"], there["memory"]) == (here["data"], here["cache"], here["memory"])
    assert there["speeds"]["requests_at_once"] == 32
    assert there["first_batch_ranged"]["reading_seconds"] < here["first_batch_ranged"]["reading_seconds"] / 10


def test_max_steps(small: str) -> None:
    assert "the run has 25 steps, 0.5 epochs" in status(small, "--batch_size", "1000", "--max_steps", "25")[1]


@pytest.mark.parametrize(
    ("given", "caution"),
    [
        ("--ranks 8 --batch_size 5", "3 ranks of 8 will have no row: the batch is smaller than the world"),
        ("--batch_size 50001", "a batch is longer than an epoch, so it has samples more than once"),
        ("--batch_size 40000", "a rank's rows may reach into more shards than a worker keeps open"),
        ("--images_per_second 80", "with ranged reads training will wait for data: 80 images/s wanted, 78.7 come"),
        ("--storage_mb_per_second 1 --images_per_second 9", "while a cache is filled training will wait for data"),
        (
            "--images_per_second 371",
            "even from a full cache training will wait for data: 371 images/s wanted, 370 come",
        ),
    ],
)
def test_cautions(small: str, given: str, caution: str) -> None:
    code, out, _ = status(small, *given.split())
    assert code == 0
    assert caution in out
    _, out, _ = status(small, *given.split(), "--json")
    assert any(caution in each for each in json.loads(out)["cautions"])


def test_no_caution_where_all_is_well(small: str) -> None:
    assert "caution" not in status(small, "--ranks", "8", "--batch_size", "512", "--images_per_second", "30")[1]


@pytest.mark.parametrize(
    "given",
    ["--ranks 0", "--nodes 0", "--batch_size 0", "--epochs 0", "--num_workers 0", "--max_steps -1", "--ranks -8",
     "--storage_mb_per_second 0", "--storage_latency_ms -1", "--decode_images_per_second nan",
     "--images_per_second 0", "--images_per_second inf", "--ranks 2 --nodes 4", "--ranks 6 --nodes 4"],
)  # fmt: skip
def test_worlds_that_cannot_be(small: str, given: str) -> None:
    code, out, err = status(small, *given.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert given.split()[0] in err


def test_nothing_to_plan_for(tmp_path: Path) -> None:
    code, _, err = status(str(tmp_path))
    assert code == 1
    assert "manifest.json: missing" in err
    write(tmp_path, np.full(3, 5), np.full(3, 500), split="test")
    code, _, err = status(str(tmp_path))
    assert code == 1
    assert "has no split 'train'; there are test" in err
    write(tmp_path, np.zeros(3), np.full(3, 500))
    code, _, err = status(str(tmp_path))
    assert code == 1
    assert "no samples" in err
    assert err.count("\n") == 1


def test_defaults_are_those_of_training() -> None:
    from launch.config import DataConfig, OptimConfig

    ours, optim = PlanConfig("data"), OptimConfig()
    assert (ours.batch_size, ours.epochs, ours.max_steps) == (optim.batch_size, optim.epochs, optim.max_steps)
    assert ours.num_workers == DataConfig().num_workers


def test_it_waits_for_nothing_heavy(small: str) -> None:
    code = (
        f"from launch import cli; import sys; status = cli.run(['plan', {small!r}]);"
        "heavy = {'torch', 'scipy', 'PIL', 'matplotlib', 'fsspec', 'aiohttp'} & set(sys.modules);"
        "sys.exit(status or ' '.join(heavy) or None)"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_million_shards_for_four_thousand_ranks(tmp_path: Path) -> None:
    shards = 1_000_000
    write(tmp_path, np.full(shards, 1000), np.random.default_rng(1).integers(10**8, 2 * 10**8, shards))
    given = ["plan", str(tmp_path), "--ranks", "4096", "--nodes", "512", "--json"]
    # The peak of the process itself; getrusage would count what it was forked from.
    code = f"from launch import cli; cli.run({given!r}); print(open('/proc/self/status').read())"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(cli.__file__).parents[1], capture_output=True, text=True, check=True
    )
    took = time.perf_counter() - began
    plan, _, process = done.stdout.partition("\n")
    peak = 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", process)[0])
    print(f"{took:.2f} s, {peak / 1e6:.0f} MB")
    assert json.loads(plan)["data"]["samples"] == 10**9
    assert took < 5
    assert peak < 0.6e9  # bytes; the manifest's file has 0.15e9
