"""`nsi submit` where no cluster is needed: what it finds before Slurm is asked, and what it would ask of Slurm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from cluster.nodes.partitions import Partition
from cluster.nodes.sbatch import split_line
from launch import runfolder
from launch.submit import merging, time_findings
from launch.submit_checks import port_findings, unwritable
from launch.submit_text import duration
from tests.launch.outside import done, nsi, refused
from tests.launch.test_hub import VIT, fill_cache

SLURM = Path(__file__).parents[2] / "slurm"
TRAIN = SLURM / "train.sbatch"
PARTITIONS = "PartitionName=main Default=YES DefaultTime=01:00:00 MaxTime=1-00:00:00 TotalNodes=4"


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, on a machine without Slurm; its site has no settings."""
    for name in [name for name in os.environ if name.startswith(("NSI_", "SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    monkeypatch.setenv("PATH", str(tools))
    (tmp_path / "site.sh").touch()
    monkeypatch.setenv("NSI_SITE", str(tmp_path / "site.sh"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(login: Path) -> Path:
    """Slurm's commands, which write down a line each of what they are asked; sbatch gives out number 7, then 8."""
    log = login / "asked"
    write(login, "scontrol", f"echo '{PARTITIONS}'")
    write(
        login,
        "sbatch",
        f"""printf '%s\\n' "$(IFS=$'\\037'; echo "$*")" >> {log}
        [[ " $* " == *" --test-only "* ]] && exit
        [[ " $* " == *" --merge"* ]] && echo 8 || echo '7;north'""",
    )
    return log


def write(login: Path, name: str, text: str) -> None:
    program = login / "tools" / name
    program.write_text(f"#!{login}/tools/bash\n{text}\n")
    program.chmod(0o755)


def calls(asked: Path) -> list[list[str]]:
    return [line.split("\037") for line in asked.read_text().splitlines()]


def train(shards: Path, *more: object) -> list[object]:
    return [TRAIN, "--data_path", shards, "--log_path", "run", "--recipe", "demo", "--batch_size", 8, *more]


def errors(*arguments: object) -> list[str]:
    """The lines that refuse a job, without the warnings of folders in /tmp."""
    said = nsi("submit", *arguments)
    assert said.status == 1, said
    assert not said.out
    return [line.removeprefix("nsi submit: ") for line in said.err.splitlines() if " warning: " not in line]


def test_help_teaches() -> None:
    told = done(nsi("submit", "--help"))
    assert "with the same words" in told
    assert "--log_path" in done(nsi("submit", TRAIN, "--help"))


def test_the_line_goes_to_sbatch_as_it_is(asked: Path, shards: Path) -> None:
    options = ["--nodes=2", "-c", "4", "--comment", "two words", "--mem", "4G"]
    told = done(nsi("submit", *options, *train(shards)))
    script = [str(word) for word in train(shards)]
    assert calls(asked) == [["--test-only", *options, *script], ["--parsable", *options, *script]]
    assert told.startswith("job 7 is in the queue of")
    assert "nsi submit slurm/monitor.sbatch run" in told


def test_the_site_fills_in_what_the_person_left_out(asked: Path, login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (login / "site.sh").write_text(
        'echo loading\nNSI_ACCOUNT=acc\nNSI_PARTITION="${NSI_PARTITION:-p}"\nNSI_QOS=q\nNSI_CONSTRAINT=$(echo "a&b")\n'
    )
    line = [SLURM / "monitor.sbatch", "run"]
    done(nsi("submit", *line))
    assert calls(asked)[-1][:4] == ["--account=acc", "--partition=p", "--qos=q", "--constraint=a&b"]
    monkeypatch.setenv("SBATCH_QOS", "mine")
    monkeypatch.setenv("NSI_PARTITION", "debug")
    done(nsi("submit", "-Amine", "--constraint", "c", *line))
    assert calls(asked)[-1][:5] == ["--partition=debug", "--parsable", "-Amine", "--constraint", "c"]


def test_what_a_script_asks_for_itself_is_not_filled_in(asked: Path, login: Path) -> None:
    (login / "site.sh").write_text("NSI_PARTITION=p\n")
    (login / "own.sbatch").write_text("#!/bin/bash\n#SBATCH -p mine\n")
    done(nsi("submit", "own.sbatch", "--any", "thing"))
    assert calls(asked)[-1] == ["--parsable", "own.sbatch", "--any", "thing"]


def test_the_site_is_read_beside_the_script(asked: Path, login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSI_SITE")
    (login / "jobs").mkdir()
    (login / "jobs" / "site.sh").write_text("NSI_ACCOUNT=beside\n")
    (login / "jobs" / "own.sbatch").write_text("#!/bin/bash\n")
    done(nsi("submit", "jobs/own.sbatch"))
    assert calls(asked)[-1][0] == "--account=beside"


@pytest.mark.parametrize(
    ("text", "told"),
    [("if then\n", "syntax error"), ("false\n", "status 1"), ("return 3", "status 1")],
    ids=["syntax", "false", "return"],
)
def test_a_site_that_bash_cannot_read_is_told(login: Path, text: str, told: str) -> None:
    (login / "site.sh").write_text(text)
    line = refused(nsi("submit", SLURM / "monitor.sbatch", "run"))
    assert f"{login}/site.sh: bash cannot read it (" in line
    assert told in line


def test_a_site_that_is_not_there_is_told(login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSI_SITE", "nowhere.sh")
    assert "NSI_SITE=nowhere.sh: no such file" in refused(nsi("submit", SLURM / "monitor.sbatch", "run"))


def test_a_merge_follows_the_parts(asked: Path, scenes: Path) -> None:
    script = SLURM / "shard.sbatch"
    options = ["--array=1-4%2", "-c", "2", "-d", "singleton", "-o", "part-%a.out", "--mem=1G"]
    told = done(nsi("submit", *options, script, scenes, "out", "--shard_samples", 5))
    assert calls(asked)[-1] == [
        "--parsable",
        "--dependency=afterok:7",
        "--kill-on-invalid-dep=yes",
        "-c",
        "2",
        "--mem=1G",
        str(script),
        "out",
        "--merge",
    ]
    assert "job 8 will merge and verify, when all parts are there" in told
    assert done(nsi("submit", "--parsable", *options, script, scenes, "out")) == "7;north\n8\n"


def test_nothing_is_merged_without_parts(asked: Path, scenes: Path) -> None:
    done(nsi("submit", SLURM / "shard.sbatch", scenes, "out"))
    done(nsi("submit", SLURM / "shard.sbatch", "out", "--merge"))
    assert [call for call in calls(asked) if any("afterok" in word for word in call)] == []


def test_merging_does_not_wait(scenes: Path) -> None:
    line = split_line(["--wait", "-HW", "--array", "1-2", "shard.sbatch", "a", "b"])
    assert merging(line, "7", "b", [])[2:] == ["-HW", "shard.sbatch", "b", "--merge"]


def test_without_slurm_it_says_where_to_go(login: Path, shards: Path) -> None:
    assert "no sbatch here; submit from a login node" in errors(*train(shards))[-1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch_size", 1], "--batch_size 1: the job may have 4 ranks, and some would have no scene; raise it"),
        (["--batch_size", 900], "has 48 scenes; lower it"),
        (["--data_path", "nowhere"], "nowhere/manifest.json: missing"),
        (["--features", "nowhere"], "nowhere/manifest.json: missing"),
        (["--backbone_weights", "w.pt"], "--backbone_weights w.pt: no such file; correct the path"),
        (["--deepspeed_config", "ds.json"], "--deepspeed_config ds.json: no such file; correct the path"),
        (["--log_path", "site.sh/run"], "site.sh is no folder; choose another folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_training_that_would_fail_is_refused(login: Path, shards: Path, flags: list[object], told: str) -> None:
    [line] = errors("--nodes=2-4", *train(shards), *flags)
    assert told in line


def test_weights_that_nodes_cannot_fetch_are_told(login: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning: the nodes may have internet after all."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(login / "hub"))
    told = f"warning: --backbone {VIT}: its weights are not in {login / 'hub'}"
    assert told in nsi("submit", *train(shards, "--backbone", VIT)).err
    assert "its weights" not in nsi("submit", *train(shards)).err  # of the demo's backbone, which has none
    (login / "weights.pt").touch()
    assert "its weights" not in nsi("submit", *train(shards, "--backbone", VIT, "--backbone_weights", "weights.pt")).err
    fill_cache(login / "hub")
    assert "its weights" not in nsi("submit", *train(shards, "--backbone", VIT)).err


def test_each_thing_that_is_wrong_is_a_line(login: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSI_LAUNCHER", "mpirun")
    monkeypatch.setenv("NSI_STAGE", "1")
    found = errors("--ntasks=9", *train(shards, "--backbone_weights", "w.pt"))
    assert [line.split()[0] for line in found] == [
        "--batch_size",
        "--backbone_weights",
        "NSI_LAUNCHER=mpirun:",
        "NSI_STAGE=1,",
    ]


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_without_a_split_are_refused(login: Path, shards: Path, scenes: Path, split: str) -> None:
    done(nsi("shard", scenes, "test-only", "--splits", "test", "--workers", 1))
    found = errors(*train(login / "test-only"))
    assert any(f"has no scenes in its split {split!r}" in line and "test 60" in line for line in found)


def test_wrong_flags_are_told_before_anything_else(login: Path, shards: Path) -> None:
    for flags in (["--lr", "fast"], ["--nonsense"]):
        assert nsi("submit", *train(shards, *flags)).status == 2
    assert "must be above 0" in refused(nsi("submit", *train(shards, "--lr", 0)), 2)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (
            ["train.sbatch", "--data_path", "", "--log_path", "run"],
            2,
            "an empty word behind --data_path; is a variable",
        ),
        (["shard.sbatch", ""], 2, "an empty word behind shard.sbatch; is a variable unset?"),
        (["shard.sbatch"], 1, "give a SOURCE and an OUT (is a variable unset?)"),
        (["shard.sbatch", "only"], 1, "give a SOURCE and an OUT (is a variable unset?)"),
        (["shard.sbatch", "nowhere", "out"], 1, "nowhere: no such folder or file; give what holds the scenes"),
        (["features.sbatch", "nowhere", "out"], 1, "nowhere/manifest.json: missing"),
        (["eval.sbatch"], 2, "give RUN, the --log_path of a training, first behind eval.sbatch"),
        (["eval.sbatch", "--split", "test", "run"], 2, "give RUN, the --log_path of a training, first behind"),
        (["eval.sbatch", "run"], 1, "run: no run (it has no config.json); give the --log_path of a training"),
        (["monitor.sbatch"], 2, "give RUN, the --log_path of a training, first behind monitor.sbatch"),
        (["monitor.sbatch", "run", "other"], 2, "monitor.sbatch takes one RUN and no more; leave other out"),
        (["nothing.sbatch"], 1, "nothing.sbatch: cannot be read (No such file or directory)"),
    ],
    ids=lambda value: shlex.join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_of_any_script_are_one_line(login: Path, words: list[str], status: int, told: str) -> None:
    said = nsi("submit", SLURM / words[0], *words[1:])
    assert said.status == status
    [line] = [line for line in said.err.splitlines() if " warning: " not in line]
    assert told in line


def test_a_run_that_is_still_to_be_trained_may_be_measured_later(asked: Path) -> None:
    said = nsi("submit", "--dependency=afterok:3", SLURM / "eval.sbatch", "run")
    assert said.status == 0
    assert "warning: run: no run" in said.err


def test_a_run_that_is_there_is_measured(asked: Path, login: Path) -> None:
    (login / "run").mkdir()
    (login / "run" / runfolder.CONFIG).write_text(json.dumps({}))
    assert "no run" not in nsi("submit", SLURM / "eval.sbatch", "run").err
    assert "no run" not in nsi("submit", "--chdir", login, SLURM / "eval.sbatch", "run").err
    assert "no run" in nsi("submit", "-D", "/", SLURM / "eval.sbatch", "run").err


def test_a_run_in_scratch_is_refused_and_shards_there_are_not(
    asked: Path, login: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSI_SCRATCH", str(login / "scratch"))
    [line] = errors(*train(shards, "--log_path", login / "scratch" / "run"))
    assert "lies in NSI_SCRATCH, of which each node has its own; choose a folder that all nodes see" in line
    monkeypatch.setenv("NSI_SCRATCH", str(shards))
    said = nsi("submit", *train(shards))
    assert said.status == 0
    assert f"warning: --data_path {shards}: lies in NSI_SCRATCH" in said.err


def test_a_folder_that_each_node_has_for_itself_is_a_warning(asked: Path, shards: Path) -> None:
    said = nsi("submit", *train(shards, "--log_path", "/dev/shm/run"))
    assert said.status == 0
    assert "warning: --log_path /dev/shm/run: /dev/shm is each node's own on most clusters" in said.err


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_that_may_not_be_written_is_refused(login: Path, mode: int) -> None:
    closed = login / "closed"
    (closed / "run").mkdir(parents=True)
    closed.chmod(mode)
    child = os.fork()
    if child == 0:  # root may write anywhere, so somebody else looks
        if os.getuid() == 0:
            for folder in (login, *login.parents):
                folder.chmod(folder.stat().st_mode | 0o111)
            os.setuid(65534)
        told = unwritable(closed / "new" / "run")
        os._exit(0 if told == f"you cannot write to {closed}" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    closed.chmod(0o700)


def test_a_folder_below_a_file_is_refused(login: Path) -> None:
    assert unwritable(login / "site.sh" / "run") == f"{login}/site.sh is no folder"
    assert unwritable(login / "new" / "run") == ""


@pytest.mark.parametrize(
    ("ports", "warns"),
    [("32768\t60999\n", False), ("30001 60999", False), ("1024 19999", False), ("1024\t65535\n", True), ("", False)],
)
def test_ports_of_any_program_are_a_warning(ports: str, warns: bool) -> None:
    found = list(port_findings(ports))
    assert [each.is_warning for each in found] == [True] * warns
    assert all("net.ipv4.ip_local_port_range" in each.text for each in found)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"time": "10"}, None),
        ({"time": "0"}, None),
        ({"time": "UNLIMITED"}, None),
        ({"time": "soon"}, None),  # sbatch tells
        ({"time": "3"}, None),
        ({"time": "2"}, "--time 2: the last 120 s are for saving; give at least --time=0:03:00"),
        ({"time": "2-0"}, "--time 2-0: partition main allows 1-0:00:00 at most; ask for less"),
        ({"time": "30", "partition": "short"}, "--time 30: partition short allows 0:10:00 at most; ask for less"),
        ({"time": "30", "partition": "short,main"}, None),
        ({"time": "3000", "partition": "short,main"}, "partition main or short allows 1-0:00:00 at most"),
        ({"partition": "short"}, "no --time, and the partition's own is 0:02:00: the last 120 s are for saving"),
        ({"partition": "free"}, None),
        ({"partition": "other"}, None),
    ],
    ids=str,
)
def test_the_time_must_do_for_job_and_partition(options: dict[str, str], told: str | None) -> None:
    partitions = [
        Partition("main", True, 4, 86_400, 3600),
        Partition("short", False, 4, 600, 120),
        Partition("free", False, 4, None, None),
    ]
    found = [each.text for each in time_findings(options, partitions, 120)]
    assert len(found) == (told is not None)
    assert (told or "") in "".join(found)
    assert list(time_findings({"time": "1"}, partitions, 0)) == []  # of a job that saves nothing


def test_a_training_that_saves_for_longer_needs_more_time(asked: Path, shards: Path) -> None:
    [line] = errors("--time=10", *train(shards, "--grace_seconds", 700))
    assert "--time 10: the last 700 s are for saving; give at least --time=0:12:40" in line


def test_durations_are_written_as_slurm_does() -> None:
    assert [duration(each) for each in (59, 3600, 90_061)] == ["0:00:59", "1:00:00", "1-1:01:01"]
