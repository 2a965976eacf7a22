"""`nsi doctor` on real processes, each a node by name: who is bad is named, and whether the job may go on without."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.nodes.findings import Findings, to_json
from tests.gloo.worlds import environment, free_port
from tests.launch.outside import done, nsi, refused
from tests.launch.test_hub import VIT, fill_cache

ROOT = Path(__file__).parents[2]
SECONDS = 60.0  # for starting Python and torch side by side on two busy cores; the healthy ones end long before
LATE = 36.0  # where somebody is waited for in vain
STARTING = 20.0  # Python itself, beside all else that is tested


@dataclass(frozen=True)
class Told:
    """What the doctor said: rank 0's lines, all ranks' statuses, and how long it took."""

    lines: list[str]
    statuses: list[int]
    errors: list[str]
    report: Path
    seconds: float

    def of(self, check: str) -> list[str]:
        """The lines of one check."""
        return [line for line in self.lines if line.split()[1:2] == [check]]

    def bad(self) -> list[str]:
        """The lines of what is not well."""
        return [line for line in self.lines if line.startswith("BAD")]

    def bad_nodes(self) -> list[str] | None:
        path = self.report / "bad-nodes"
        return path.read_text().split() if path.exists() else None

    def findings(self, node: str) -> dict[str, Any]:
        return json.loads((self.report / f"{node}.json").read_text())


def meet(
    folder: Path,
    nodes: int,
    *arguments: object,
    start: Sequence[int] | None = None,
    one: tuple[int, Sequence[object], dict[str, str]] = (-1, (), {}),
    seconds: float = SECONDS,
    port: int = 0,
) -> Told:
    """The doctor on the nodes n1, n2, ... as srun starts it.

    `start`: the ranks that start at all; `one`: a rank that gets further arguments and variables.
    """
    port, processes, began = port or free_port(), [], time.monotonic()
    report = folder / "report"
    for rank in start if start is not None else range(nodes):
        more, variables = (one[1], one[2]) if rank == one[0] else ((), {})
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "GLOO", "NSI"))},
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NUM_TASKS": str(nodes),
            "SLURM_STEP_NODELIST": f"n[1-{nodes}]",
            "SLURM_STEP_TASKS_PER_NODE": f"1(x{nodes})",
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(rank),
            "SLURM_LOCALID": "0",
            "SLURMD_NODENAME": f"n{rank + 1}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        command = [sys.executable, "-m", "launch", "doctor", "--report", report, "--seconds", seconds]
        processes.append(
            subprocess.Popen(
                [str(word) for word in (*command, *arguments, *more)],
                env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=seconds + 30) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [line for out, _ in said for line in out.splitlines()]
    statuses = [process.returncode for process in processes]
    return Told(lines, statuses, [error for _, error in said], report, time.monotonic() - began)


def other_version(folder: Path) -> dict[str, str]:
    """Variables of a process to which a package seems to have another version."""
    info = folder / "packages" / "webdataset-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.0.1\n")
    return {"PYTHONPATH": str(info.parent)}


# --- alone ---


def test_alone_without_arguments() -> None:
    lines = done(nsi("doctor")).splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", "nodes"], ["ok", "versions"], ["ok", "gpus"]]
    assert lines[-1] == "all well"


def test_alone_with_all_there_is(shards: Path, tmp_path: Path) -> None:
    weights, scratch = tmp_path / "vit.safetensors", tmp_path / "scratch"
    weights.write_bytes(bytes(2_000_000))
    scratch.mkdir()
    places = (
        "--data_path",
        shards,
        "--log_path",
        tmp_path / "run",
        "--backbone_weights",
        weights,
        "--scratch",
        scratch,
    )
    text = done(nsi("doctor", *places))
    fingerprint = json.loads((shards / "manifest.json").read_text())["fingerprint"]
    assert f"{shards}: fingerprint {fingerprint[:12]}" in text
    assert f"{weights}: 2.0 MB" in text
    assert f"{tmp_path / 'run'}: can be written" in text
    assert f"{scratch}: " in text
    assert not list(scratch.iterdir())
    assert not list((tmp_path / "run" / "doctor").iterdir())  # its mark is gone


def test_what_is_missing_is_the_jobs_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = {
        "--data_path": tmp_path / "no-shards",
        "--backbone_weights": tmp_path / "no-weights",
        "--log_path": tmp_path / "file",
        "--scratch": tmp_path / "file" / "scratch",
    }
    said = nsi("doctor", *(word for pair in places.items() for word in pair))
    assert said.status == 1
    bad = [line for line in said.out.splitlines() if line.startswith("BAD")]
    assert [line.split()[1] for line in bad] == ["data", "weights", "log_path", "scratch"]
    for line, (flag, place) in zip(bad, places.items(), strict=True):
        assert str(place) in line, flag
        assert ";" in line, "says what to do"
    assert said.out.splitlines()[-1] == "the job cannot run like this"


def test_weights_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked for where training would take them; a recipe's backbone may need none."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )
    said = nsi("doctor", "--recipe", "reference")
    assert said.status == 1
    [line] = [line for line in said.out.splitlines() if line.startswith("BAD")]
    assert f"--backbone vit_base_patch8_224.dino: its weights are not in {tmp_path / 'hub'}, and the hub" in line
    for without in (["--recipe", "demo"], ["--backbone", "dct"], ["--recipe", "reference", "--backbone", "dct"]):
        assert "fetched at the start, or none needed" in done(nsi("doctor", *without))
    fill_cache(tmp_path / "hub")
    assert f"weights    {VIT}: 0.0 MB" in done(nsi("doctor", "--backbone", VIT))
    assert "--recipe no: unknown; there are default, reference, demo" in nsi("doctor", "--recipe", "no").out


def test_a_manifest_that_was_damaged(shards: Path, tmp_path: Path) -> None:
    text = (shards / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"variant"', '"varient"'))
    said = nsi("doctor", "--data_path", tmp_path)
    assert said.status == 1
    assert "BAD   data       " + str(tmp_path / "manifest.json") in said.out


def test_gpus_asked_for_without_a_driver_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretended GPUs, as on a test cluster; a node that has a driver is asked for more (tests/cluster)."""
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists():
        pytest.skip("this machine has a driver of GPUs")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # DeepSpeed, where a test before imported it, sets it
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    lines = done(nsi("doctor")).splitlines()
    assert "warn  gpus       asked for 2 GPUs, but no node has a driver of them" in lines[2]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # by choice, of which there is nothing to tell
    assert "none asked for" in done(nsi("doctor"))


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    said = nsi("doctor")
    assert said.status == 1
    assert "there is no interface 'ib77', only lo" in said.out


@pytest.mark.parametrize(
    ("words", "named"), [(["--gpus", "-1"], "--gpus -1"), (["--seconds", "0"], "--seconds 0.0: must be at least 5")]
)
def test_wrong_usage(words: list[str], named: str) -> None:
    assert named in refused(nsi("doctor", *words), 2)


def test_its_file_does_not_wait_for_torch() -> None:
    """Which is imported under a limit."""
    code = "import launch.doctor, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_it_does_not_import_deepspeed() -> None:
    code = "import sys; from launch import cli; cli.run(['doctor']); sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_a_folder_that_never_answers(tmp_path: Path) -> None:
    """A pipe into which nobody writes stands for a file whose server is gone."""
    os.mkfifo(tmp_path / "manifest.json")
    told = meet(tmp_path, 1, "--data_path", tmp_path, seconds=LATE)
    assert told.statuses == [1]
    assert told.bad() == [f"BAD   data       no answer within {LATE / 4:.0f} s"]
    assert told.seconds < LATE + STARTING


# --- together ---


@pytest.mark.slow
def test_three_nodes_that_are_well(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = meet(tmp_path, 3, "--data_path", shards, "--log_path", run)
    assert told.statuses == [0, 0, 0], told
    checks = ["nodes", "versions", "gpus", "interface", "data", "log_path", "clock", "network"]
    assert [line.split()[:2] for line in told.lines[:-1]] == [["ok", check] for check in checks]
    assert told.lines[-1] == "all well"
    assert told.of("nodes") == ["ok    nodes      n1, n2, n3 (3)"]
    assert told.of("interface") == ["ok    interface  lo"]
    assert told.of("log_path") == [f"ok    log_path   {run}: one folder, which all nodes see and can write"]
    assert "GB/s by gloo" in told.of("network")[0]
    assert told.bad_nodes() is None
    assert {path.name for path in told.report.iterdir()} == {"n1.json", "n2.json", "n3.json"}
    assert not list((run / "doctor").iterdir())
    assert all(told.findings(f"n{number}")["reduce_speed"] > 0 for number in (1, 2, 3))


@pytest.mark.slow
def test_one_node_with_another_folder_and_another_version(tmp_path: Path) -> None:
    """Rank 0 is the odd one: what it sees is not the measure."""
    elsewhere = tmp_path / "mounted-elsewhere"
    one = (0, ("--log_path", elsewhere), other_version(tmp_path))
    told = meet(tmp_path, 3, "--log_path", tmp_path / "run", one=one)
    assert told.statuses == [3, 3, 3], told
    usual = told.findings("n2")["packages"]["webdataset"]
    assert told.bad() == [
        f"BAD   versions   n1: webdataset is 0.0.1, on the other nodes {usual}",
        "BAD   log_path   n1: is another folder here than on the other nodes; look at its mounts",
    ]
    assert told.lines[-1] == "bad nodes: n1"
    assert told.bad_nodes() == ["n1"]


@pytest.mark.slow
def test_two_nodes_that_differ_are_the_jobs_fault(tmp_path: Path) -> None:
    told = meet(tmp_path, 2, one=(1, (), other_version(tmp_path)))
    assert told.statuses == [1, 1], told
    usual = told.findings("n1")["packages"]["webdataset"]
    assert told.bad() == [
        f"BAD   versions   webdataset differs: {usual} on n1, 0.0.1 on n2; make it the same on all nodes"
    ]
    assert told.bad_nodes() is None


@pytest.mark.slow
def test_files_that_one_node_does_not_have(shards: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "file").write_text("")
    one = (2, ("--data_path", tmp_path, "--scratch", tmp_path / "file" / "scratch"), {})
    told = meet(tmp_path, 3, "--data_path", shards, "--scratch", scratch, one=one)
    assert told.statuses == [3, 3, 3], told
    assert [line.split()[1:3] for line in told.bad()] == [["data", "n3:"], ["scratch", "n3:"]]
    assert "manifest.json: missing" in told.of("data")[0]
    assert told.bad_nodes() == ["n3"]


@pytest.mark.slow
def test_two_processes_of_another_launcher_on_one_node(tmp_path: Path) -> None:
    port, command = free_port(), [sys.executable, "-m", "launch", "doctor", "--report", str(tmp_path / "report")]
    processes = [
        subprocess.Popen(command, env=environment(rank, 2, port), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    node = os.uname().nodename
    assert outs[0].splitlines()[0] == f"ok    nodes      {node}, {node} (2)"
    assert outs[1] == ""
    assert {path.name for path in (tmp_path / "report").iterdir()} == {f"{node}.json", f"{node}-1.json"}


@pytest.mark.slow
def test_a_node_that_never_starts(tmp_path: Path) -> None:
    told = meet(tmp_path, 3, start=(0, 2), seconds=LATE)
    assert told.statuses == [3, 3], told
    assert [line.split(";")[0] for line in told.bad()] == ["BAD   nodes      n2: never started"]
    assert told.bad_nodes() == ["n2"]
    assert told.seconds < LATE + STARTING


@pytest.mark.long
def test_rank_0_never_starts(tmp_path: Path) -> None:
    """The first of the others speaks in its place."""
    told = meet(tmp_path, 3, start=(1, 2), seconds=LATE)
    assert told.statuses == [3, 1], told
    assert [line.split(";")[0] for line in told.bad()] == ["BAD   nodes      n1: never started"]
    assert told.bad_nodes() == ["n1"]
    assert "node n3 cannot meet the others: 127.0.0.1:" in told.errors[1]
    assert told.errors[1].count("\n") == 1
    assert told.seconds < LATE + STARTING


@pytest.mark.slow
def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = meet(tmp_path, 2, start=(0,), port=port, seconds=LATE)
    assert told.statuses == [1]
    assert f"nsi doctor: 127.0.0.1:{port}: cannot be the meeting place" in told.errors[0]
    assert told.errors[0].endswith("set MASTER_PORT to a free port\n")
    assert told.errors[0].count("\n") == 1


def test_the_keys_of_a_report() -> None:
    """slurm/README.md and whoever reads REPORT/NODE.json count on them."""
    assert list(json.loads(to_json(Findings("n1", 0)))) == [
        "node", "rank", "checked", "python", "packages", "gpus_asked", "gpus", "cuda", "driver", "interface", "address",
        "port", "data", "data_bytes", "weights_bytes", "scratch_free", "mark", "marks_seen", "clock", "pair_speed",
        "reduce_speed", "backend", "troubles",
    ]  # fmt: skip
