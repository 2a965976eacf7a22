"""The words of `nsi plan`: what a run will need, as a person reads it, and what to be careful of."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from shards.capacity import Capacity, Share
from shards.pace import FirstBatch, Pace, Speeds

UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB", "EB")


def to_text(title: str, needs: Capacity, times: Pace, speeds: Speeds, wanted: float | None) -> str:
    """The plan. `wanted` is a speed of all ranks in images a second, where one was named."""
    parts = {
        "data": _data(title, needs),
        "world": _world(needs),
        "length": _length(needs),
        "ranged reads": _ranged(needs),
        "node cache": _cache(needs),
        "indexes": _indexes(needs),
        "open files": _open_files(needs),
        "first batch": _first_batches(times),
        "data rate": _rates(times, speeds, wanted),
        "memory": _memory(needs),
        "caution": cautions(needs, times, wanted),
    }
    return "\n".join(
        f"{name if number == 0 else '':14}{line}" for name, lines in parts.items() for number, line in enumerate(lines)
    )


def cautions(needs: Capacity, times: Pace, wanted: float | None) -> Iterator[str]:
    """What a person should know before starting such a run."""
    world, shards, rates = needs.world, needs.open_shards, times.rates
    if world.batch_size < world.ranks:
        idle = world.ranks - world.batch_size
        yield f"{_many(idle, 'rank')} of {world.ranks:,} will have no row: the batch is smaller than the world"
    if world.batch_size > needs.data.samples:
        yield "a batch is longer than an epoch, so it has samples more than once"
    if shards.a_rank_a_step_at_most > shards.kept_a_worker_at_most:
        yield "a rank's rows may reach into more shards than a worker keeps open, which then opens them again each step"
    for way, rate in (
        ("with ranged reads", rates.ranged),
        ("while a cache is filled", rates.filling_cache),
        ("even from a full cache", rates.full_cache),
    ):
        if wanted is not None and wanted > rate.images_per_second:
            come = _number(rate.images_per_second)
            yield f"{way} training will wait for data: {_number(wanted)} images/s wanted, {come} come"


def _data(title: str, needs: Capacity) -> Iterator[str]:
    data = needs.data
    yield (
        f"{title}: {_many(data.shards, 'shard')}, {_many(data.samples, 'sample')}, {_bytes(data.bytes)}; "
        f"the manifest {_bytes(data.manifest_bytes)}, indexes about {_bytes(data.index_bytes_about)}"
    )
    yield "bytes below are at most: training reads no masks, but the manifest knows whole shards only"


def _world(needs: Capacity) -> Iterator[str]:
    world, masked = needs.world, needs.masked_rows_a_step
    yield (
        f"{_many(world.ranks, 'rank')} on {_many(world.nodes, 'node')}; a batch of {_many(world.batch_size, 'sample')} "
        f"is {_rows(needs.rank)}, {f'{masked:,} masked' if masked else 'none masked'}"
    )


def _rows(rank: Share) -> str:
    if rank.parts_with_most == rank.parts:
        return f"{_many(rank.rows_at_most, 'row')} a rank"
    rest = rank.parts - rank.parts_with_most
    rows = _many(rank.rows_at_most, "row")
    return f"{rows} on {_many(rank.parts_with_most, 'rank')}, {rank.rows_at_least:,} on {rest:,}"


def _length(needs: Capacity) -> Iterator[str]:
    length = needs.length
    exactly = f"{needs.data.samples:,}/{needs.world.batch_size:,}"
    yield (
        f"an epoch is {exactly} = {_fraction(length.steps_an_epoch)} steps; "
        f"the run has {_many(length.steps, 'step')}, {_fraction(length.epochs)} epochs"
    )


def _ranged(needs: Capacity) -> Iterator[str]:
    whole = _bytes(needs.data.bytes)
    yield f"an epoch: {_amount(needs.rank)} a rank, {_amount(needs.node)} a node, {whole} all nodes together"


def _amount(share: Share) -> str:
    return f"{_fraction(share.samples_an_epoch_at_most)} samples ({_bytes(float(share.bytes_an_epoch_at_most))})"


def _cache(needs: Capacity) -> Iterator[str]:
    cache, smallest, whole = needs.cache, needs.cache.bytes_needed, needs.cache.bytes_needed_to_fetch_once
    yield (
        f"an epoch: {_bytes(cache.bytes_an_epoch_at_most)} a node, {_bytes(cache.bytes_an_epoch_all_nodes_at_most)} "
        "all nodes together, as each takes samples from every shard"
    )
    if smallest < whole:
        yield f"it needs {_bytes(smallest)} a node for the block that is read and the next, and fetches anew each epoch"
    yield f"it needs {_bytes(whole)} a node to hold the split, and fetches it once"


def _indexes(needs: Capacity) -> Iterator[str]:
    indexes = needs.indexes
    yield (
        f"{'once' if indexes.read_once else 'an epoch'}, either way: about {_bytes(indexes.bytes_a_rank_about)} "
        f"({_number(indexes.shards_a_rank_about)} shards) a rank, {_bytes(indexes.bytes_a_node_about)} a node"
    )


def _open_files(needs: Capacity) -> Iterator[str]:
    shards = needs.open_shards
    yield (
        f"a batch reaches into at most {_many(shards.a_batch_at_most, 'shard')}, a rank's rows into at most "
        f"{shards.a_rank_a_step_at_most:,}; a worker keeps at most {shards.kept_a_worker_at_most:,} open"
    )


def _first_batches(times: Pace) -> Iterator[str]:
    yield f"ranged reads: {_phases(times.first_batch_ranged)}"
    yield f"node cache: {_phases(times.first_batch_cached)}"


def _phases(first: FirstBatch) -> str:
    return (
        f"about {_seconds(first.seconds)} (opening {_seconds(first.opening_seconds)}, "
        f"reading {_seconds(first.reading_seconds)}, decoding {_seconds(first.decoding_seconds)})"
    )


def _rates(times: Pace, speeds: Speeds, wanted: float | None) -> Iterator[str]:
    rates = times.rates
    yield (
        f"at most {_number(rates.ranged.images_per_second)} images/s with ranged reads, "
        f"{_number(rates.filling_cache.images_per_second)} while a cache is filled, "
        f"{_number(rates.full_cache.images_per_second)} from a full one"
    )
    yield f"decoding alone does {_number(rates.decoding_images_per_second)}"
    if wanted is not None:
        ranged, filling = (wanted * rate.mb_a_node_per_image for rate in (rates.ranged, rates.filling_cache))
        yield (
            f"{_number(wanted)} images/s take {_number(ranged)} MB/s a node with ranged reads, "
            f"{_number(filling)} to fill a cache; the storage gives {_number(speeds.storage_mb_per_second)}"
        )


def _memory(needs: Capacity) -> Iterator[str]:
    memory = needs.memory
    yield (
        f"{_bytes(memory.bytes_a_rank)} a rank: manifest {_bytes(memory.manifest_bytes_a_rank)}, order "
        f"{_bytes(memory.order_bytes_a_rank)}, indexes {_bytes(memory.index_bytes_a_rank)}; "
        f"{_bytes(memory.bytes_a_node)} a node; batches on top"
    )


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _fraction(value: Fraction) -> str:
    """Two digits after the point, where there are any; more of a value below 1."""
    return f"{float(value):.3g}" if value < 1 else f"{float(value):,.2f}".rstrip("0").rstrip(".")


def _number(value: float) -> str:
    """Three digits, or all before the point where there are more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _bytes(count: float) -> str:
    power = 0
    while count >= 999.5 and power + 1 < len(UNITS):
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"


def _seconds(seconds: float) -> str:
    return f"{_number(seconds)} s" if seconds >= 0.01 else f"{_number(seconds * 1000)} ms"
