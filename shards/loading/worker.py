"""A data worker: a process that reads samples and decodes them into memory it shares with training.

It knows neither order nor manifest: it is told where samples lie and which rows they fill. It imports no torch, so it
starts in a fraction of a second, and it ends when the other end of its connection is closed, however that happens.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import NamedTuple

import numpy as np

from nsi.errors import UserError
from shards.loading.rows import BatchShape, Read, Rows, fill_row, memory_size, rows_of
from shards.reading.reader import SpanReader
from shards.reading.sample import Damaged, Sample, Source


class Open(NamedTuple):
    """Told first of each data set."""

    number: int
    source: Source


class Share(NamedTuple):
    """Told first of each batch's memory; its file descriptor comes apart from it."""

    memory: int
    shape: BatchShape


class Fill(NamedTuple):
    """Rows to fill, and the ticket to send back."""

    ticket: int
    source: int
    memory: int
    samples: list[tuple[int, Sample]]  # row, sample


class Filled(NamedTuple):
    """What a worker says when it is done: what was read of each row, or what is wrong with it."""

    ticket: int
    read: list[tuple[int, Read]]
    faults: list[tuple[int, int, str, str, str]]  # row, sample id, shard, key, what is wrong
    failure: str  # why nothing could be read at all; "" where something could


def work(connection: Connection, handles: Connection) -> None:
    """Serves until the connection is closed. File descriptors come through `handles`."""
    sources: dict[int, tuple[Source, SpanReader]] = {}
    memories: dict[int, tuple[Rows, int]] = {}
    while True:
        task = connection.recv()
        if isinstance(task, Open):
            sources[task.number] = task.source, task.source.reader()
        elif isinstance(task, Share):
            rows = _map(recv_handle(handles), task.shape)
            memories[task.memory] = rows, task.shape.scene.squash_size
        else:
            connection.send(_fill(task, *memories[task.memory], *sources[task.source]))


def _fill(task: Fill, rows: Rows, squash_size: int, source: Source, reader: SpanReader) -> Filled:
    read, faults = [], []
    try:
        spans = reader.read([sample.span for _, sample in task.samples])
        for (row, sample), data in zip(task.samples, spans, strict=True):
            try:
                read.append((row, _fill_row(rows, row, sample, data, squash_size, source, reader)))
            except UserError as error:
                faults.append((row, sample.sample, sample.span.shard, sample.key, str(error)))
    except UserError as error:
        return Filled(task.ticket, [], [], str(error))
    except Exception as error:  # a defect, here or in a library: training must hear of it, or it would wait for ever
        return Filled(task.ticket, [], [], f"a data worker failed: {type(error).__name__}: {error}")
    return Filled(task.ticket, read, faults, "")


def _fill_row(
    rows: Rows,
    row: int,
    sample: Sample,
    data: memoryview | bytes,
    squash_size: int,
    source: Source,
    reader: SpanReader,
) -> Read:
    try:
        return fill_row(rows, row, sample, data, source, squash_size)
    except Damaged:
        if source.cache is None:
            raise
        return fill_row(rows, row, sample, reader.read_anew(sample.span, data), source, squash_size)


def _map(file: int, shape: BatchShape) -> Rows:
    memory = mmap.mmap(file, memory_size(shape))
    os.close(file)
    return rows_of(np.frombuffer(memory, np.uint8), shape)


def main(connection: int, handles: int) -> None:
    """What the process runs: its ends of the two connections, as file descriptors."""
    try:
        work(Connection(connection), Connection(handles))
    except (EOFError, ConnectionError):
        os._exit(0)  # training has ended: there is nothing to tidy up
