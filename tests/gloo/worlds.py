"""Runs a worker file as a real world of gloo processes and brings back what each rank found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables of one rank, as a launcher sets them."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
    }


def run_world(worker: str, size: int, folder: Path, *arguments: str, timeout_s: float = 300) -> list[dict]:
    """`python WORKER OUT ARGUMENTS` on each rank; returns the JSON that each wrote to its OUT."""
    port = free_port()
    outs = [folder / f"{worker}-{size}-{rank}.json" for rank in range(size)]
    logs = [out.with_suffix(".log") for out in outs]
    processes = []
    for rank in range(size):
        with logs[rank].open("w") as log:
            command = [sys.executable, str(HERE / worker), str(outs[rank]), *arguments]
            processes.append(
                subprocess.Popen(
                    command, env=environment(rank, size, port), stdout=log, stderr=log, cwd=HERE.parents[1]
                )
            )
    try:
        statuses = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0] * size, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads(out.read_text()) for out in outs]
