"""Attempts, events, sinks and the Prometheus endpoint: what a run leaves behind and shows."""

from __future__ import annotations

import json
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.checkpoints.attempt import is_replaced, is_superseded, read_attempts, take_attempt
from cluster.records.appender import Appender
from cluster.records.clock import Clock
from cluster.records.events import Event, EventLog
from cluster.records.prometheus import LABELS, serve
from cluster.records.sinks import METRIC_KEYS, metrics_sink, validation_sink
from cluster.world import World
from nsi.errors import UserError

ALONE = World(0, 1, 0, 1, "127.0.0.1", 0, "none")
STEPS = Event(
    "steps",
    20,
    100.0,
    104.0,
    {
        "epoch": 0.5,
        "loss": 3.5,
        "contrastive": 3.0,
        "reconstruction": 0.5,
        "lr": 1e-4,
        "grad_norm": 2.0,
        "images_per_second": 160.0,
        "world_size": 1,
        "zero_stage": 1,
        "steps": 10,
        "images": 640,
        "data_wait_seconds": 1.0,
        "step_seconds": 3.0,
        "nonfinite_steps": 1,
        "overflows": 2,
        "loss_scale": 512.0,
        "slowness": 1.5,
    },
    {"step": 3.0, "data_wait": 1.0},
)


def test_attempts_count_up(tmp_path: Path) -> None:
    numbers = [take_attempt(tmp_path, 2, "torchrun", step).number for step in (0, 5, 9)]
    assert numbers == [1, 2, 3]
    assert [attempt.restored_step for attempt in read_attempts(tmp_path)] == [0, 5, 9]


def test_no_two_attempts_share_a_number(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: take_attempt(tmp_path, 1, "none", 0).number, range(40)))
    assert sorted(taken) == list(range(1, 41))


def test_what_a_successor_replays_is_superseded(tmp_path: Path) -> None:
    for step in (0, 10, 30):
        take_attempt(tmp_path, 1, "none", step)
    attempts = read_attempts(tmp_path)
    assert is_superseded(11, 1, attempts)  # attempt 2 went on from 10
    assert not is_superseded(10, 1, attempts)
    assert not is_superseded(20, 2, attempts)
    assert is_superseded(31, 2, attempts)
    assert not is_superseded(99, 3, attempts)


def test_an_attempt_learns_that_it_was_replaced(tmp_path: Path) -> None:
    first = take_attempt(tmp_path, 1, "none", 0)
    assert not is_replaced(tmp_path, first)
    second = take_attempt(tmp_path, 1, "none", 0)
    assert is_replaced(tmp_path, first)
    assert not is_replaced(tmp_path, second)


def test_who_is_not_answered_does_not_know_whether_it_was_replaced(tmp_path: Path) -> None:
    first = take_attempt(tmp_path / "attempts", 1, "none", 0)
    (tmp_path / "attempts" / "attempt-0002.json").mkdir()
    with pytest.raises(IsADirectoryError):
        is_replaced(tmp_path / "attempts", first)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        is_replaced(tmp_path / "loop", first)
    assert not is_replaced(tmp_path / "taken away", first)


def test_broken_numbers_become_null(tmp_path: Path) -> None:
    """NaN is no JSON, and other programs read these lines."""
    appender = Appender()
    sink = metrics_sink(tmp_path / "metrics.jsonl", 1, appender)
    sink(replace(STEPS, facts={**STEPS.facts, "loss": float("nan"), "grad_norm": float("inf")}))
    appender.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["loss"], found["grad_norm"], found["contrastive"]) == (None, None, 3.0)


def test_a_cut_attempt_file_is_passed_over(tmp_path: Path) -> None:
    first = take_attempt(tmp_path, 1, "none", 0)
    (tmp_path / "attempt-0002.json").write_text('{"number": 2')
    assert len(read_attempts(tmp_path)) == 1
    assert not is_replaced(tmp_path, first)
    assert take_attempt(tmp_path, 1, "none", 0).number == 3


def test_events_are_lines_and_reach_every_sink(tmp_path: Path) -> None:
    seen: list[Event] = []
    appender = Appender()
    log = EventLog(tmp_path / "events", 3, 1, [seen.append], Clock(0.0), appender)
    log.emit(STEPS)
    assert appender.close() == 0
    lines = (tmp_path / "events" / "attempt-0003-rank-00001.jsonl").read_text().splitlines()
    assert [replace(event, seconds=STEPS.seconds) for event in seen] == [STEPS]
    assert json.loads(lines[0])["facts"]["loss"] == 3.5


def test_metrics_lines_have_the_contracts_keys(tmp_path: Path) -> None:
    appender = Appender()
    sink = metrics_sink(tmp_path / "metrics.jsonl", 4, appender)
    sink(STEPS)
    sink(Event("checkpoint", 20, 0.0, 1.0))
    appender.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert set(found) == {"step", "attempt", *METRIC_KEYS}
    assert (found["step"], found["attempt"], found["loss"]) == (20, 4, 3.5)


def test_validation_lines(tmp_path: Path) -> None:
    appender = Appender()
    sink = validation_sink(tmp_path / "validation.jsonl", 1, appender)
    sink(STEPS)
    sink(Event("validation", 30, 0.0, 1.0, {"R@5": 0.25}))
    appender.close()
    assert json.loads((tmp_path / "validation.jsonl").read_text()) == {"step": 30, "R@5": 0.25, "attempt": 1}


def scrape(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(set(sample.labels) == set(LABELS) for sample in samples)
    return {sample.name: sample.value for sample in samples}


def test_prometheus_tells_what_happened(tmp_path: Path) -> None:
    endpoint = serve(ALONE, tmp_path, 0)
    endpoint.sink(STEPS)
    endpoint.sink(STEPS)
    endpoint.sink(Event("validation", 20, 0.0, 1.0, {"R@5": 0.25}))
    endpoint.sink(Event("checkpoint", 20, 0.0, 2.5, {}, {"checkpoint": 2.5}))
    endpoint.sink(Event("storage", 20, 0.0, 0.0, {"text": "no room"}))
    found = scrape(endpoint.port)
    assert found["nsi_steps_total"] == 20
    assert found["nsi_images_total"] == 1280
    assert found["nsi_data_wait_seconds_total"] == 2.0
    assert found["nsi_step_seconds_total"] == 6.0
    assert found["nsi_contrastive_loss_nats"] == 3.0
    assert (found["nsi_nonfinite_steps_total"], found["nsi_overflows_total"]) == (2, 4)
    assert found["nsi_loss_scale_ratio"] == 512
    assert found["nsi_validation_recall_at_5_ratio"] == 0.25
    assert found["nsi_checkpoint_seconds_total"] == 2.5
    assert (found["nsi_storage_failures_total"], found["nsi_slowness_ratio"]) == (1, 1.5)
    assert not endpoint.target.exists()
    endpoint.register()
    (targets,) = json.loads(endpoint.target.read_text())
    assert targets["targets"] == [f"127.0.0.1:{endpoint.port}"]
    endpoint.deregister()
    assert not endpoint.target.exists()


def test_an_attempt_that_was_replaced_leaves_its_successor_in_the_target_list(tmp_path: Path) -> None:
    older, newer = (serve(ALONE, tmp_path, 0) for _ in range(2))
    older.register()
    newer.register()
    older.deregister()
    (targets,) = json.loads(newer.target.read_text())
    assert targets["targets"] == [f"127.0.0.1:{newer.port}"]
    newer.deregister()
    assert not newer.target.exists()


def test_prometheus_names_are_frozen(tmp_path: Path) -> None:
    """Dashboards and alerts hang on these names."""
    endpoint = serve(ALONE, tmp_path, 0)
    assert {name for name in scrape(endpoint.port) if not name.endswith("_created")} == {
        "nsi_loss_nats",
        "nsi_contrastive_loss_nats",
        "nsi_reconstruction_loss_ratio",
        "nsi_learning_rate_ratio",
        "nsi_gradient_norm_ratio",
        "nsi_epochs_ratio",
        "nsi_loss_scale_ratio",
        "nsi_nonfinite_steps_total",
        "nsi_overflows_total",
        "nsi_steps_total",
        "nsi_images_total",
        "nsi_step_seconds_total",
        "nsi_data_wait_seconds_total",
        "nsi_bad_samples_total",
        "nsi_checkpoints_total",
        "nsi_checkpoint_seconds_total",
        "nsi_eval_seconds_total",
        "nsi_restore_seconds_total",
        "nsi_start_seconds_total",
        "nsi_storage_failures_total",
        "nsi_slowness_ratio",
        "nsi_progress_steps",
        "nsi_validation_recall_at_5_ratio",
    }


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--prometheus_port {port}: port {port} cannot be used by rank 0"):
            serve(ALONE, tmp_path, port)
