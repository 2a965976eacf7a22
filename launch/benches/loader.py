"""The loader beside what reads shards otherwise: webdataset's own pipeline, and the picture decoder on its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from launch.benches.comparison import Comparison, compare, note, stopwatch
from launch.benches.scenes import rendered
from shards.decode import decode_image
from shards.index import index_path
from shards.loading.loader import rank_ids, training_batches
from shards.loading.rows import SceneShape
from shards.loading.workers import DataWorkers, open_workers
from shards.manifest import Manifest, ShardTable, read_manifest, shard_name, write_manifest
from shards.order import Order
from shards.processes import as_they_end, process_pool
from shards.reading.dataset import Split, open_split
from shards.reading.sample import training_bytes
from shards.sources.folder import list_folder
from shards.writing.cut import Settings
from shards.writing.survey import survey_folders
from shards.writing.write import write_shards

BATCH = 128
IMAGE_SIZE = 224
FIRST_BATCH_SAMPLES = 50_000
_READ_ROUNDS_S = 1.0  # each side reads the split again until so long has passed


def comparisons(data: Path | None, scenes: int) -> Iterator[Comparison]:
    """Each comparison as it is measured. Medians, so that a first round on a cold page cache does not count."""
    with contextlib.ExitStack() as closing:
        folder = data or closing.enter_context(_made_shards(scenes))
        split = open_split(folder, "train")
        urls = [str(folder / shard.name) for shard in split.table]
        yield compare(
            "loader/read-vs-webdataset",
            "samples/s/core",
            "webdataset.WebDataset, undecoded",
            ours=lambda: _read(split),
            other=lambda: _read_by_webdataset(urls),
        )
        workers = os.cpu_count() or 1
        images = [split.read(sample, "image") for sample in range(min(len(split), 512))]
        with process_pool(max(2, workers), folder) as pool, open_workers(workers) as running:
            yield compare(
                "loader/decode-vs-decoder",
                "images/s",
                f"decoding and resizing to {IMAGE_SIZE} alone, on {workers} cores",
                ours=lambda: _load(split, running),
                other=lambda: sum(as_they_end(pool, _decode, [images] * workers)),
            )
        large = closing.enter_context(many_samples(folder, FIRST_BATCH_SAMPLES))
        count = len(open_split(large, "train"))
        yield compare(
            "loader/first-batch",
            "s",
            f"webdataset.WebDataset with a shuffle buffer of 1000, {BATCH} of {count:,} samples, from process start",
            ours=lambda: _first_batch("ours", large),
            other=lambda: _first_batch("webdataset", large),
            rounds=3,
        )


def _read(split: Split) -> float:
    """Samples a second, read in the order of training, each byte of image and JSON verified."""
    reader = split.source.reader()
    order = Order(split.shard_samples, 0, BATCH)
    read = 0
    with stopwatch() as seconds:
        for ids_R in rank_ids(order, 0, 1, 0):
            samples = split.locate(ids_R)
            for sample, data in zip(samples, reader.read([each.span for each in samples]), strict=True):
                training_bytes(sample, data, split.source)
            read += BATCH
            if seconds() > _READ_ROUNDS_S:
                return read / seconds()
    raise AssertionError("the order has no end")


def _read_by_webdataset(urls: list[str]) -> float:
    import webdataset.compat

    read = 0
    with stopwatch() as seconds:
        while seconds() < _READ_ROUNDS_S:
            for sample in webdataset.compat.WebDataset(urls, shardshuffle=False, empty_check=False):
                read += "json" in sample
        return read / seconds()


def _load(split: Split, workers: DataWorkers) -> float:
    """Images a second through the whole loader, once it runs."""
    order = Order(split.shard_samples, 0, BATCH)
    batches = training_batches(split, order, SceneShape(IMAGE_SIZE, 10), 0, 1, 0, workers)
    for _ in range(3):
        next(batches)
    loaded = 0
    with contextlib.closing(batches), stopwatch() as seconds:
        while seconds() < 3 * _READ_ROUNDS_S:
            loaded += int(next(batches).rows_B.sum())
        return loaded / seconds()


def _decode(images: list[bytes]) -> float:
    """Images a second of one process, from memory into one array."""
    pixels_SS3 = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    decoded = 0
    with stopwatch() as seconds:
        while seconds() < 3 * _READ_ROUNDS_S:
            for image in images[:64]:
                pixels_SS3[:] = decode_image(image, IMAGE_SIZE)
            decoded += min(64, len(images))
        return decoded / seconds()


_OURS = """
from shards.reading.dataset import open_split
from shards.loading.loader import rank_ids, training_batches
from shards.order import Order
from shards.loading.rows import SceneShape
from shards.loading.workers import open_workers
split = open_split(sys.argv[1], "train")
with open_workers(int(sys.argv[3])) as workers:
    order = Order(split.shard_samples, 0, int(sys.argv[2]))
    batch = next(training_batches(split, order, SceneShape(224, 10), 0, 1, 0, workers))
    print(time.perf_counter() - began, flush=True)
"""
_WEBDATASET = """
import glob, webdataset, torch
urls = sorted(glob.glob(sys.argv[1] + "/train-*.tar"))
def to_tensor(sample):
    picture, json = sample
    return torch.from_numpy(np.asarray(picture.resize((224, 224)))), json
import numpy as np
data = webdataset.WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(1000).decode("pil")
data = data.to_tuple("png;jpg;webp", "json").map(to_tensor)
loader = torch.utils.data.DataLoader(data, int(sys.argv[2]), num_workers=int(sys.argv[3]), collate_fn=list)
next(iter(loader))
print(time.perf_counter() - began, flush=True)
import os
os._exit(0)  # not to wait for its workers
"""


def _first_batch(whose: str, folder: Path) -> float:
    """Seconds from the first line of a fresh process, before its imports, to its first batch."""
    code = "import sys, time; began = time.perf_counter()" + (_OURS if whose == "ours" else _WEBDATASET)
    command = [sys.executable, "-c", code, str(folder), str(BATCH), str(os.cpu_count() or 1)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@contextlib.contextmanager
def _made_shards(scenes: int) -> Iterator[Path]:
    with rendered(scenes) as source, tempfile.TemporaryDirectory() as temporary:
        note("writing shards")
        out = Path(temporary) / "shards"
        with process_pool(os.cpu_count() or 1, out) as pool:
            found = survey_folders(list_folder(source), pool, lambda done: None)
            write_shards(found, Settings(), out, pool, lambda done: None)
        yield out


@contextlib.contextmanager
def many_samples(folder: Path, samples_wanted: int) -> Iterator[Path]:
    """A data set of at least so many training samples, made by giving a folder's shards many names."""
    manifest = read_manifest(folder)
    shards = list(manifest.splits["train"])
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target, linked, samples = Path(temporary), [], 0
        for number, shard in enumerate(itertools.cycle(shards)):
            if samples >= samples_wanted:
                break
            name = shard_name("train", number)
            for source, link in ((shard.name, name), (index_path(Path(shard.name)).name, index_path(Path(name)).name)):
                os.link(folder / source, target / link)
            linked.append(shard._replace(name=name))
            samples += shard.samples
        content = {**vars(manifest), "splits": {"train": ShardTable.of("train", linked)}}
        write_manifest(target, Manifest(**content))
        yield target
        shutil.rmtree(target, ignore_errors=True)
