"""The scripts around training, as jobs: shards and features by many jobs, figures of a run, a page to watch it."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request
from pathlib import Path

import pytest

from cluster.records.events import Event
from cluster.records.prometheus import serve
from cluster.world import World
from tests.launch.outside import contents, done, nsi
from tests.slurm.cluster.commands import Cluster

SLURM = Path(__file__).parents[2] / "slurm"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, on a cluster whose site needs no settings."""
    (tmp_path / "site.sh").touch()
    monkeypatch.setenv("NSI_SITE", str(tmp_path / "site.sh"))
    monkeypatch.setenv("NSI_PYTHON", sys.executable)
    return tmp_path


def python_that(here: Path, first: str) -> dict[str, str]:
    """Variables of a job whose python does something else when the job starts for the first time."""
    program = here / "python"
    again = f'exec {sys.executable} "$@"'
    program.write_text(f"#!/bin/bash\nif [[ ! ${{SLURM_RESTART_COUNT:-}} ]]; then\n{first}\nfi\n{again}\n")
    program.chmod(0o755)
    return {"NSI_PYTHON": str(program)}


def output(cluster: Cluster, here: Path, job: int | str) -> str:
    return (here / f"slurm-{job}.out").read_text()


def test_parts_that_are_cut_make_the_same_shards(cluster: Cluster, here: Path, scenes: Path, shards: Path) -> None:
    # Whatever a part has written by then, it hangs.
    cut = f'timeout --signal=KILL 0.7 {sys.executable} "$@"; touch {here}/hangs-$SLURM_ARRAY_TASK_ID; sleep 1000'
    script = [SLURM / "shard.sbatch", scenes, here / "out", "--shard_samples", "10"]
    parts = cluster.sbatch("--array=1-3", "--cpus-per-task=2", *script, cwd=here, environment=python_that(here, cut))
    after = [f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes"]
    merge = cluster.sbatch(*after, SLURM / "shard.sbatch", here / "out", "--merge", cwd=here)
    cluster.wait_for(lambda: len(list(here.glob("hangs-*"))) == 3, 30, "three parts hang")
    cluster.run(["scontrol", "requeue", f"{parts}_1"])
    cluster.run(["scontrol", "requeue", f"{parts}_2"])
    cluster.run(["scancel", "--batch", "--signal=USR1", f"{parts}_3"])  # as when its time is nearly up
    for part in (1, 2, 3):
        cluster.start_now(f"{parts}_{part}")
    cluster.wait_for_state(merge, "COMPLETED")
    assert {cluster.job(f"{parts}_{part}")["Restarts"] for part in (1, 2, 3)} == {"1"}
    assert "time is up, and there is more to do; back to the queue" in output(cluster, here, f"{parts}_3")
    assert "60 samples, all as they were written" in output(cluster, here, merge)
    assert contents(here / "out") == contents(shards)


def test_one_job_writes_all_shards(cluster: Cluster, here: Path, scenes: Path, shards: Path) -> None:
    script = [SLURM / "shard.sbatch", scenes, here / "out", "--shard_samples", "10"]
    cluster.wait_for_state(cluster.sbatch("--cpus-per-task=2", *script, cwd=here), "COMPLETED")
    assert contents(here / "out") == contents(shards)


def test_a_merge_does_not_follow_a_part_that_failed(cluster: Cluster, here: Path) -> None:
    (here / "scenes").mkdir()
    parts = cluster.sbatch("--array=1-2", SLURM / "shard.sbatch", here / "scenes", here / "out", cwd=here)
    after = [f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes"]
    merge = cluster.sbatch(*after, SLURM / "shard.sbatch", here / "out", "--merge", cwd=here)
    cluster.wait_for_state(merge, "CANCELLED")
    assert cluster.state(f"{parts}_1") == "FAILED"


def test_an_array_that_begins_elsewhere_is_refused(cluster: Cluster, here: Path, scenes: Path) -> None:
    job = cluster.sbatch("--array=2-3", SLURM / "shard.sbatch", scenes, here / "out", cwd=here)
    cluster.wait_for_state(f"{job}_2", "FAILED")
    assert output(cluster, here, f"{job}_2").startswith("shard.sbatch: the array must be 1-N; ")
    assert output(cluster, here, f"{job}_2").count("\n") == 1
    assert not (here / "out").exists()


def test_jobs_with_a_gpu_each_store_features(cluster: Cluster, here: Path, shards: Path) -> None:
    flags = ["--backbone", "dct", "--image_size", "32"]
    hang = "touch hangs-$SLURM_ARRAY_TASK_ID; sleep 1000"
    script = ["--array=1-2", "--gpus-per-node=1", SLURM / "features.sbatch", shards, here / "store", *flags]
    parts = cluster.sbatch(*script, cwd=here, environment=python_that(here, hang))
    cluster.wait_for(lambda: len(list(here.glob("hangs-*"))) == 2, 30, "two parts hang")
    for part in (1, 2):
        cluster.run(["scontrol", "requeue", f"{parts}_{part}"])
        cluster.start_now(f"{parts}_{part}")
    for part in (1, 2):
        cluster.wait_for_state(f"{parts}_{part}", "COMPLETED")
    done(nsi("features", shards, here / "one", *flags))
    assert contents(here / "store") == contents(here / "one")


def test_watching_finds_a_rank(cluster: Cluster, here: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is missing; apt-get install prometheus")
    run = here / "run"
    run.mkdir()
    settings = (SLURM / "prometheus.yml").read_text().replace("interval: 10s", "interval: 1s")
    (run / "prometheus.yml").write_text(settings)  # a person's own, which is kept
    endpoint = serve(World(0, 1, 0, 1, cluster.place.login, 0, "none"), run, 0)
    endpoint.sink(Event("validation", 10, 5.0, 6.0, {"R@5": 0.75}))
    job = cluster.sbatch(SLURM / "monitor.sbatch", run, cwd=here)
    cluster.wait_for(lambda: "http://localhost:9090" in cluster.output(job), 30, "it says where its page is")
    place = cluster.output(job).split(" at http://")[1].split(";")[0]
    node, _, port = place.partition(":")
    query = f"http://{cluster.place.address(node)}:{port}/api/v1/query?query=nsi_validation_recall_at_5_ratio"
    target = [{"targets": [f"{cluster.place.login}:{endpoint.port}"], "labels": {"job": "nsi"}}]
    endpoint.target.write_text(json.dumps(target))  # by its address, since the login host has no name on the nodes

    def found() -> list[str]:
        try:
            with urllib.request.urlopen(query, timeout=5) as answer:
                return [each["value"][1] for each in json.load(answer)["data"]["result"]]
        except OSError:  # it is not up yet
            return []

    cluster.wait_for(lambda: found() == ["0.75"], 30, "the rank's figure is there")
    assert (run / "alerts.yml").read_text() == (SLURM / "alerts.yml").read_text()
    assert (run / "prometheus.yml").read_text() == settings
    cluster.run(["scancel", str(job)])
    cluster.wait_for_state(job, "CANCELLED")


def test_without_prometheus_it_says_what_to_do(cluster: Cluster, here: Path) -> None:
    tools = here / "tools"  # all that there is, but one program
    tools.mkdir()
    for path in (each for folder in ("/usr/bin", "/bin") for each in Path(folder).iterdir()):
        if path.name != "prometheus" and not (tools / path.name).is_symlink():
            (tools / path.name).symlink_to(path)
    job = cluster.sbatch(f"--export=PATH={tools},NSI_SITE", SLURM / "monitor.sbatch", here / "run", cwd=here)
    cluster.wait_for_state(job, "FAILED")
    assert output(cluster, here, job).startswith("monitor.sbatch: no prometheus on ")
    assert output(cluster, here, job).count("\n") == 1


@pytest.mark.parametrize("script", ["eval.sbatch", "monitor.sbatch"])
def test_an_unset_variable_is_told(cluster: Cluster, here: Path, script: str) -> None:
    job = cluster.sbatch(SLURM / script, cwd=here)
    cluster.wait_for_state(job, "FAILED")
    told = f"{script}: give RUN, the --log_path of a training, behind the script's name\n"
    assert output(cluster, here, job) == told
