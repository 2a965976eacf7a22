"""Training's side of its data workers: starts them, shares memory with them, and turns filled memory into batches.

A batch's memory is shared with the workers that decode into it and, on a GPU, pinned, so that pixels are written once
and leave for the device from where they were written. It is used again when the last tensor of its batch is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

import numpy as np
import torch

from nsi.batch import Batch, Fault
from nsi.errors import UserError
from shards.loading.rows import EMPTY, BatchShape, Read, Rows, memory_size, rows_of
from shards.loading.worker import Fill, Filled, Open, Share
from shards.reading.dataset import Split
from shards.tokens import TokenShape

_ROWS_A_TASK = 64  # messages stay far below what a socket holds, so that neither side ever waits for the other to read
# Schedulers and terminals signal every process of a job. What to do is training's business; workers end with it.
_NOT_FOR_WORKERS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


@dataclass
class _Memory:
    """One batch's memory. `number` is its name among the workers."""

    number: int
    shape: BatchShape
    map: mmap.mmap


@dataclass
class _Order:
    """A batch on its way."""

    memory: _Memory
    tasks: int
    wanted: bool = True
    failure: str = ""
    read: dict[int, Read] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


class DataWorkers:
    """Running workers. Batches are asked for with `submit` and had with `wait`, in any order; for one thread."""

    def __init__(
        self, processes: list[subprocess.Popen], connections: list[Connection], handles: list[Connection], pin: bool
    ) -> None:
        self._processes, self._connections, self._handles = processes, connections, handles
        self._pin = pin
        self._pinned: list[int] = []  # addresses
        self._sources: dict[int, Split] = {}
        self._free: list[_Memory] = []
        self._memories = self._tickets = self._turn = 0
        self._orders: dict[int, _Order] = {}

    def submit(self, split: Split, shape: BatchShape, ids_R: np.ndarray) -> int:
        """Asks for the batch of some samples, and returns its ticket. Rows beyond them stay empty."""
        source = self._source(split)
        memory = self._take(shape)
        located = list(enumerate(split.locate(ids_R)))
        a_task = max(1, min(_ROWS_A_TASK, -(-len(located) // len(self._connections))))
        tasks = [located[start : start + a_task] for start in range(0, len(located), a_task)]
        self._tickets += 1
        self._orders[self._tickets] = _Order(memory, len(tasks))
        for task in tasks:
            self._receive_what_is_there()
            self._send(self._turn, Fill(self._tickets, source, memory.number, task))
            self._turn = (self._turn + 1) % len(self._connections)
        return self._tickets

    def wait(self, ticket: int) -> Batch:
        """The batch of a ticket. Raises UserError where the shards could not be read or a worker is gone."""
        order = self._orders[ticket]
        while order.tasks:
            for connection in multiprocessing.connection.wait(self._connections):
                self._receive(self._connections.index(connection))  # type: ignore[arg-type]
        if order.failure:
            self.give_up(ticket)
            raise UserError(order.failure)
        del self._orders[ticket]
        return self._batch(order)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [process.pid for process in self._processes]

    @property
    def memories(self) -> int:
        """How many batches' memory has been taken so far."""
        return self._memories

    def give_up(self, ticket: int) -> None:
        """Says that nobody will wait for a ticket. Its memory is used again when the workers are done with it."""
        order = self._orders[ticket]
        order.wanted = False
        self._settle(ticket, order)

    def close(self) -> None:
        """Ends the workers."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()  # nothing of theirs is worth waiting for
            process.wait()
        for address in self._pinned:  # or the next one at that address could not be pinned
            _cuda().cudaHostUnregister(address)

    def _batch(self, order: _Order) -> Batch:
        memory, shape = order.memory, order.memory.shape
        owner = np.frombuffer(memory.map, np.uint8, memory_size(shape))
        weakref.finalize(owner, self._free.append, memory)  # every tensor below is a view of it
        rows = rows_of(owner, shape)
        rows.clear([row for row in range(shape.rows) if row not in order.read])
        reads = [order.read.get(row, Read("", 0)) for row in range(shape.rows)]
        ids_B = torch.from_numpy(rows.ids_R)
        return Batch(
            ids_B,
            ids_B != EMPTY,
            torch.from_numpy(rows.images_RSS3).permute(0, 3, 1, 2),
            torch.from_numpy(rows.labels_RT3),
            torch.from_numpy(rows.positions_RT3),
            torch.from_numpy(rows.objects_RT),
            tuple(read.key for read in reads),
            tuple(read.digest for read in reads),
            tuple(sorted(order.faults)),
            *_features(rows, shape.scene.tokens),
        )

    def _source(self, split: Split) -> int:
        for number, known in self._sources.items():
            if known is split:
                return number
        number = len(self._sources)
        self._sources[number] = split
        for worker in range(len(self._connections)):
            self._send(worker, Open(number, split.source))
        return number

    def _take(self, shape: BatchShape) -> _Memory:
        """Memory of a batch whose tensors are gone, or more memory where none is."""
        for memory in self._free:
            if memory.shape == shape:
                self._free.remove(memory)
                return memory
        file = _anonymous_file(memory_size(shape))
        memory = _Memory(self._memories, shape, mmap.mmap(file, memory_size(shape)))
        self._memories += 1
        for worker, process in enumerate(self._processes):
            self._send(worker, Share(memory.number, shape))
            send_handle(self._handles[worker], file, process.pid)
        os.close(file)
        if self._pin:
            address = np.frombuffer(memory.map, np.uint8).ctypes.data
            torch.cuda.check_error(int(_cuda().cudaHostRegister(address, memory_size(shape), 0)))
            self._pinned.append(address)
        return memory

    def _send(self, worker: int, task: Open | Share | Fill) -> None:
        try:
            self._connections[worker].send(task)
        except OSError:
            raise self._lost(worker) from None

    def _receive_what_is_there(self) -> None:
        for worker, connection in enumerate(self._connections):
            while connection.poll():
                self._receive(worker)

    def _receive(self, worker: int) -> None:
        try:
            filled: Filled = self._connections[worker].recv()
        except (EOFError, OSError):
            raise self._lost(worker) from None
        order = self._orders[filled.ticket]
        order.tasks -= 1
        order.failure = order.failure or filled.failure
        order.read.update(filled.read)
        order.faults += [Fault(*fault) for fault in filled.faults]
        self._settle(filled.ticket, order)

    def _settle(self, ticket: int, order: _Order) -> None:
        if not order.tasks and not order.wanted:
            del self._orders[ticket]
            self._free.append(order.memory)

    def _lost(self, worker: int) -> UserError:
        status = self._processes[worker].wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        if status == -signal.SIGBUS:  # how a mapped file tells that its disk failed or that it was cut meanwhile
            folders = ", ".join(sorted({split.folder for split in self._sources.values()}))
            return UserError(
                f"a data worker (process {self._processes[worker].pid}) ended {how}: a shard was cut or its disk "
                f"failed while it was read; run `nsi verify` on {folders}"
            )
        return UserError(
            f"a data worker (process {self._processes[worker].pid}) ended {how}, perhaps for want of memory; "
            "start again, with fewer --num_workers if it happens again"
        )


@contextlib.contextmanager
def open_workers(count: int, pin: bool = False) -> Iterator[DataWorkers]:
    """Starts `count` workers, and ends them afterwards. `pin`: a GPU copies straight from the batches' memory."""
    processes, connections, handles = [], [], []
    with contextlib.ExitStack() as starting:
        for _ in range(count):
            # File descriptors go their own way: some systems acknowledge each, which must not meet an answer.
            (ours, theirs), (our_handles, their_handles) = multiprocessing.Pipe(), multiprocessing.Pipe()
            connections.append(starting.enter_context(ours))
            handles.append(starting.enter_context(our_handles))
            with theirs, their_handles:
                processes.append(_start(theirs.fileno(), their_handles.fileno()))
        workers = DataWorkers(processes, connections, handles, pin)
        starting.callback(workers.close)
        yield workers


def _features(rows: Rows, shape: TokenShape | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A batch's features and their scales, as `Batch` has them."""
    if shape is None:
        return None, None
    stored_BPF = torch.from_numpy(rows.tokens_RPF)
    if shape.storage == "bf16":
        return stored_BPF.view(torch.bfloat16), None
    return stored_BPF, torch.from_numpy(rows.scales_RP)


def _start(*files: int) -> subprocess.Popen:
    code = f"import sys; sys.path[:] = {sys.path!r}; from shards.loading.worker import main; main{files}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:  # a child inherits the mask
        return subprocess.Popen([sys.executable, "-c", code], pass_fds=files, stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cuda() -> Any:
    return torch.cuda.cudart()


def _anonymous_file(size: int) -> int:
    """A file without a name, in memory where the system has such files: nothing of it is left, however we end."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("batch")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.ftruncate(file, size)
    return file
