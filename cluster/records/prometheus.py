"""A Prometheus endpoint for each rank, and the file by which a Prometheus server finds it.

The endpoint listens on a free port unless one is asked for, and RUN/prometheus/rank-NNNNN.json says which: point
`file_sd_configs` at those files (slurm/prometheus.yml does). Names follow the OpenMetrics rules and end in their unit.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from cluster.records.events import Event, Sink
from cluster.world import World
from nsi.errors import UserError

TARGETS = "prometheus"  # the folder of a run that lists its endpoints
LABELS = ("run", "rank", "node", "slurm_job_id")

_GAUGES = {
    "loss": ("nsi_loss_nats", "Training loss of the last logged step, of the whole batch"),
    "contrastive": ("nsi_contrastive_loss_nats", "Contrastive part of the loss"),
    "reconstruction": ("nsi_reconstruction_loss_ratio", "Reconstruction part of the loss, mean squared error"),
    "lr": ("nsi_learning_rate_ratio", "Learning rate"),
    "grad_norm": ("nsi_gradient_norm_ratio", "Global gradient norm before clipping"),
    "epoch": ("nsi_epochs_ratio", "Passes over the training split so far"),
    "loss_scale": ("nsi_loss_scale_ratio", "What fp16 multiplies its loss with; 1 in other precisions"),
}


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint: where it listens, the sink that feeds it, and the file that tells Prometheus of it."""

    address: str
    port: int
    sink: Sink
    target: Path

    def register(self) -> None:
        """Enters the endpoint into Prometheus' target list. Raises UserError where it cannot be written."""
        temporary = self.target.with_suffix(".tmp")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(self._entry())
            temporary.rename(self.target)
        except OSError as error:
            raise UserError(
                f"{self.target}: cannot be written ({error.strerror}); make room or choose another --log_path"
            ) from None

    def deregister(self) -> None:
        """Takes the endpoint out of Prometheus' target list; do so before the process ends, or alerts fire.

        The entry of an attempt that has taken over lies in the same place, and stays.
        """
        with contextlib.suppress(OSError):  # on a folder turned read-only; how the run ended matters more
            if self.target.read_bytes() == self._entry():
                self.target.unlink()

    def _entry(self) -> bytes:
        return json.dumps([{"targets": [f"{self.address}:{self.port}"], "labels": {"job": "nsi"}}]).encode()


def serve(world: World, run: Path, port: int) -> Endpoint:
    """Starts this rank's endpoint on `port` + local rank, or on any free port where `port` is 0; writes nothing yet.

    Raises UserError where the port is taken.
    """
    registry = CollectorRegistry()
    labels = {
        "run": run.name,
        "rank": str(world.rank),
        "node": socket.gethostname(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
    }
    wanted = port + world.local_rank if port else 0
    try:
        server, _ = start_http_server(wanted, registry=registry)
    except OSError as error:
        raise UserError(
            f"--prometheus_port {port}: port {wanted} cannot be used by rank {world.rank} ({error.strerror}); "
            "choose another, or 0 for any free one"
        ) from None
    # A laptop's own name often leads nowhere; on a cluster the server is another machine.
    alone = world.size == 1 and not labels["slurm_job_id"]
    address = "127.0.0.1" if alone else socket.gethostname()
    target = run / TARGETS / f"rank-{world.rank:05d}.json"
    return Endpoint(address, server.server_port, _sink(registry, labels), target)


def forget_endpoints(run: Path) -> None:
    """Takes out what a killed attempt left in the target list, before this attempt's ranks enter themselves."""
    for target in (run / TARGETS).glob("rank-*.json"):
        target.unlink(missing_ok=True)


def _sink(registry: CollectorRegistry, labels: dict[str, str]) -> Sink:
    def gauge(name: str, text: str) -> Gauge:
        return Gauge(name, text, LABELS, registry=registry).labels(**labels)

    def counter(name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=registry).labels(**labels)

    gauges = {key: gauge(*described) for key, described in _GAUGES.items()}
    steps = counter("nsi_steps", "Optimizer steps done by this process")
    images = counter("nsi_images", "Images of the whole batch trained on since this process began")
    seconds = {
        "start": counter("nsi_start_seconds", "Seconds from the process's beginning to its first step"),
        "restore": counter("nsi_restore_seconds", "Seconds spent finding and loading a checkpoint"),
        "data_wait": counter("nsi_data_wait_seconds", "Seconds spent waiting for data"),
        "step": counter("nsi_step_seconds", "Seconds spent in steps, the wait for data left out"),
        "checkpoint": counter("nsi_checkpoint_seconds", "Seconds that steps stood still for checkpoints"),
        "eval": counter("nsi_eval_seconds", "Seconds spent in validation"),
    }
    storage = counter("nsi_storage_failures", "Times that something of the run could not be written; it is tried again")
    bad_samples = counter("nsi_bad_samples", "Damaged scenes that --on_bad_sample skip passed over, of all ranks")
    overflows = counter("nsi_overflows", "Steps left out since fp16 gradients overflowed")
    nonfinite = counter("nsi_nonfinite_steps", "Steps left out since the loss or its gradient was no finite number")
    saves = counter("nsi_checkpoints", "Checkpoints that lie on disk")
    step_now = gauge("nsi_progress_steps", "Steps done since the run began, over all attempts")
    slowness = gauge("nsi_slowness_ratio", "This rank's own part of a step as a multiple of the median rank's")
    recall = gauge("nsi_validation_recall_at_5_ratio", "Validation retrieval R@5, mean of both directions")

    def feed(event: Event) -> None:
        step_now.set(event.step)
        for bucket, spent in event.seconds.items():
            seconds[bucket].inc(spent)
        if event.kind == "steps":
            for key, made in gauges.items():
                made.set(event.facts[key])
            steps.inc(event.facts["steps"])
            images.inc(event.facts["images"])
            overflows.inc(event.facts["overflows"])
            nonfinite.inc(event.facts["nonfinite_steps"])
            slowness.set(event.facts["slowness"])
        elif event.kind == "bad_samples":
            bad_samples.inc(event.facts["count"])
        elif event.kind == "saved":
            saves.inc()
        elif event.kind == "storage":
            storage.inc()
        elif event.kind == "validation":
            recall.set(event.facts["R@5"])

    return feed
