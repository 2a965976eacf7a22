"""What a node finds out by itself, and that nothing it asks holds it up."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from cluster.nodes.checks import (
    check_host_name,
    file_bytes,
    gpus_asked,
    interface_towards,
    leave_mark,
    node_name,
    package_versions,
    scratch_free,
)  # fmt: skip
from cluster.nodes.findings import Findings, Gpu, from_json, leave, read_all, to_json
from cluster.nodes.within import within
from nsi.errors import UserError


def refuse() -> None:
    raise UserError("it is full; make room")


def test_works_under_a_limit() -> None:
    never = threading.Event()
    begin = time.monotonic()
    done, troubles = within(0.3, {"hangs": never.wait, "good": lambda: 7, "bad": refuse, "odd": lambda: [][0]})
    never.set()
    assert time.monotonic() - begin < 5
    assert done == {"good": 7}
    assert troubles == {
        "hangs": "no answer within 0 s",
        "bad": "it is full; make room",
        "odd": "IndexError: list index out of range",
    }


def test_findings_survive_their_file(tmp_path: Path) -> None:
    mine = Findings("n1", 3, gpus=(Gpu("H100", 5, 3), Gpu("GPU 1", 0, 0, "lost")), marks_seen=(True, False))
    assert from_json(to_json(mine)) == mine
    leave(tmp_path / "report", mine, "n1")
    leave(tmp_path / "report", Findings("n0", 1), "n0")
    (tmp_path / "report" / "torn.json").write_text("{")
    assert read_all(tmp_path / "report", 0) == [Findings("n0", 1), mine]
    os.utime(tmp_path / "report" / "n0.json", (1000, 1000))
    assert read_all(tmp_path / "report", 2000) == [mine]  # the other is of an earlier meeting


def test_the_name_of_a_node() -> None:
    assert node_name({"SLURMD_NODENAME": "gpu07"}) == "gpu07"
    assert node_name({}) == os.uname().nodename


def test_package_versions_name_what_is_there() -> None:
    versions = package_versions()
    assert versions["torch"]
    assert versions["prometheus-client"]
    assert set(versions) == {
        "torch", "timm", "deepspeed", "webdataset", "h5py", "accelerate", "prometheus-client", "numpy",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "env", "asked"),
    [
        (None, {}, 0),
        (None, {"SLURM_GPUS_ON_NODE": "8"}, 8),
        (4, {"SLURM_GPUS_ON_NODE": "8"}, 4),
        (0, {"SLURM_GPUS_ON_NODE": "8"}, 0),
        (None, {"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": "cpu"}, 0),
        (4, {"DS_ACCELERATOR": "cpu"}, 0),
    ],
)
def test_gpus_asked(given: int | None, env: dict[str, str], asked: int) -> None:
    assert gpus_asked(given, env) == asked


def test_the_interface_towards_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NSI_INTERFACE"):
        monkeypatch.delenv(name, raising=False)
    assert interface_towards("127.0.0.1", 29500) == ("lo", "127.0.0.1")
    monkeypatch.setenv("NSI_INTERFACE", "lo")
    assert interface_towards("127.0.0.1", 29500) == ("lo", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(UserError, match="there is no interface 'ib7', only lo.*NSI_INTERFACE in slurm/site.sh"):
        interface_towards("127.0.0.1", 29500)


def test_a_master_that_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(UserError, match="no way to .*correct MASTER_ADDR"):
        interface_towards("no host at all", 29500)


def test_a_host_name_that_leads_to_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    with pytest.raises(UserError, match="its name localhost has the address .*; set NSI_INTERFACE=eth0 in"):
        check_host_name("eth0", "10.0.0.1")
    check_host_name("lo", "127.0.0.1")  # all nodes are on one machine
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_host_name("eth0", "10.0.0.1")


def test_marks_have_names_of_their_own(tmp_path: Path) -> None:
    first, second = leave_mark(tmp_path / "run"), leave_mark(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {first, second}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run: cannot be written .*choose another --log_path"):
        leave_mark(tmp_path / "file" / "run")


def test_scratch(tmp_path: Path) -> None:
    assert scratch_free(tmp_path) > 0
    assert not list(tmp_path.iterdir())
    assert scratch_free(tmp_path / "mine") > 0  # made where it is missing
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written .*correct NSI_SCRATCH"):
        scratch_free(tmp_path / "file")


def test_weights(tmp_path: Path) -> None:
    (tmp_path / "vit").write_bytes(b"12345")
    (tmp_path / "empty").touch()
    assert file_bytes(tmp_path / "vit") == 5
    with pytest.raises(UserError, match="empty: is empty"):
        file_bytes(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        file_bytes(tmp_path)
