"""The loader: any number of ranks gives the same global batches, from any step, with the right content."""

from __future__ import annotations

import gc
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nsi.errors import UserError
from shards.coverage import read_digest
from shards.decode import decode_image, decode_mask
from shards.loading.feed import on_device
from shards.loading.loader import check_fits, refuse_faults, training_batches, whole_split
from shards.loading.rows import BatchShape, SceneShape, memory_size, rows_of
from shards.loading.workers import DataWorkers, open_workers
from shards.order import Order
from shards.reading.cache import ShardCache
from shards.reading.dataset import Split, open_split
from shards.schema_json import decode_schema

SHAPE = SceneShape(image_size=32, max_objects=10)


@pytest.fixture(scope="module")
def train(shards: Path) -> Split:
    return open_split(shards, "train")


@pytest.fixture(scope="module")
def workers() -> Iterator[DataWorkers]:
    with open_workers(2) as running:
        yield running


def take(batches, count: int) -> list:
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_together_give_the_order(train: Split, workers: DataWorkers, world: int) -> None:
    order = Order(train.shard_samples, 3, 14)
    ranks = [take(training_batches(train, order, SHAPE, rank, world, 2, workers), 3) for rank in range(world)]
    for place, step in enumerate(range(2, 5)):
        batches = [rank[place] for rank in ranks]
        assert len({len(batch) for batch in batches}) == 1  # ranks always have equally many rows
        ids = torch.cat([batch.sample_ids_B[batch.rows_B] for batch in batches])
        assert ids.tolist() == order.batch(step).tolist()
        for batch in batches:
            for row in range(len(batch)):
                sample = int(batch.sample_ids_B[row])
                assert batch.keys[row] == (train.key(sample) if sample >= 0 else "")


def test_rows_hold_their_scenes(train: Split, workers: DataWorkers) -> None:
    order = Order(train.shard_samples, 0, 5)
    (batch,) = take(training_batches(train, order, SHAPE, 0, 1, 0, workers), 1)
    for row, sample in enumerate(batch.sample_ids_B.tolist()):
        schema = decode_schema(train.read(sample, "json"))
        count = len(schema.primitives)
        assert batch.objects_BT[row].sum() == count
        assert batch.objects_BT[row, :count].all()
        expected = [(p.size, p.shape, p.material) for p in schema.primitives]
        assert [tuple(label) for label in batch.labels_BT3[row, :count].tolist()] == expected
        torch.testing.assert_close(
            batch.positions_BT3[row, :count], torch.tensor([p.position for p in schema.primitives])
        )
        image = decode_image(train.read(sample, "image"), 32)
        assert torch.equal(batch.images_BCHW[row].permute(1, 2, 0), torch.from_numpy(image.copy()))
        (located,) = train.locate([sample])
        assert batch.digests[row] == read_digest(schema.key, located.image.xxh3, located.json.xxh3)


def test_empty_rows_are_empty(train: Split, workers: DataWorkers) -> None:
    order = Order(train.shard_samples, 0, 5)
    take(training_batches(train, order, SHAPE, 0, 2, 0, workers), 4)  # fills the memory that comes back below
    gc.collect()
    (batch,) = take(training_batches(train, order, SHAPE, 0, 2, 0, workers), 1)  # 2 of 3 rows
    assert batch.rows_B.tolist() == [True, True, False]
    assert batch.sample_ids_B[2] == -1
    for name, tensor in batch.tensors().items():
        assert name == "sample_ids_B" or not tensor[2].any()
    assert (batch.keys[2], batch.digests[2], batch.faults) == ("", 0, ())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_whole_split_has_every_scene_once(shards: Path, workers: DataWorkers, world: int) -> None:
    split = open_split(shards, "val")
    ranks = [list(whole_split(split, SHAPE, 4, rank, world, workers)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1  # all ranks take part in equally many collectives
    ids = [i for rank in ranks for batch in rank for i in batch.sample_ids_B[batch.rows_B].tolist()]
    assert sorted(ids) == list(range(len(split)))


def test_batches_that_are_kept_stay_as_they_are(train: Split, workers: DataWorkers) -> None:
    """Memory is used again only when the last view of a batch is gone."""
    order = Order(train.shard_samples, 0, 8)
    batches = training_batches(train, order, SHAPE, 0, 1, 0, workers)
    kept = [next(batches) for _ in range(12)]
    corner = kept[3].images_BCHW[2, :, :4, :4]
    copies = [batch.images_BCHW.clone() for batch in kept]
    expected = corner.clone()
    assert all(torch.equal(batch.images_BCHW, copy) for batch, copy in zip(kept, copies, strict=True))
    del kept, copies
    gc.collect()
    for _ in range(12):
        next(batches)
    batches.close()
    assert torch.equal(corner, expected)  # one small view is enough


def test_memory_is_used_again(train: Split) -> None:
    order = Order(train.shard_samples, 0, 8)
    with open_workers(1) as workers:
        for batch in itertools.islice(training_batches(train, order, SHAPE, 0, 1, 0, workers), 20):
            assert len(batch) == 8
            del batch
        assert workers.memories <= 5  # two ahead, one on its way, one with the caller, one being let go


def test_two_streams_share_the_workers(shards: Path, train: Split, workers: DataWorkers) -> None:
    """As training and validation do."""
    order = Order(train.shard_samples, 0, 8)
    training = training_batches(train, order, SHAPE, 0, 1, 0, workers)
    first = next(training)
    val = open_split(shards, "val")
    assert sum(int(batch.rows_B.sum()) for batch in whole_split(val, SHAPE, 4, 0, 1, workers)) == len(val)
    second = next(training)
    training.close()
    assert first.sample_ids_B.tolist() == order.batch(0).tolist()
    assert second.sample_ids_B.tolist() == order.batch(1).tolist()


def test_large_batches_do_not_lock_up(train: Split) -> None:
    """Far more messages than a socket holds, on both sides."""
    order = Order(train.shard_samples, 0, 6000)
    with open_workers(1) as workers:
        (batch,) = take(training_batches(train, order, SceneShape(8, 10), 0, 1, 0, workers), 1)
    assert batch.sample_ids_B.tolist() == order.batch(0).tolist()


def test_a_damaged_scene_is_an_empty_row_with_its_fault(shards: Path, tmp_path: Path, workers: DataWorkers) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    split = open_split(copy, "val")
    (broken,) = split.locate([2])
    flip(copy / "val-000000.tar", broken.image.offset + 10)
    (batch,) = list(whole_split(open_split(copy, "val"), SHAPE, 6, 0, 1, workers))
    assert batch.rows_B.tolist() == [True, True, False, True, True, True]
    assert not batch.images_BCHW[2].any()
    (fault,) = batch.faults
    assert (fault.row, fault.sample, fault.shard, fault.key) == (2, 2, "val-000000.tar", broken.key)
    where = f"val-000000.tar: image of {broken.key} at offset {broken.image.offset} does not have its checksum"
    assert where in fault.text
    with pytest.raises(UserError, match=f"image of {broken.key}"):
        refuse_faults(batch)


def test_a_damaged_copy_in_the_cache_is_healed(shards: Path, tmp_path: Path, workers: DataWorkers) -> None:
    """A disk that lost a bit costs one more copy, and no sample."""
    cache = ShardCache(tmp_path / "cache", 10**9)
    split = open_split(shards, "val", cache)
    (first,) = list(whole_split(split, SHAPE, 6, 0, 1, workers))
    (copy,) = (tmp_path / "cache").rglob("val-000000.tar")
    os.chmod(copy, 0o644)
    flip(copy, split.locate([2])[0].image.offset + 10)
    (again,) = list(whole_split(open_split(shards, "val", cache), SHAPE, 6, 0, 1, workers))
    assert again.faults == ()
    assert again.digests == first.digests
    assert copy.read_bytes() == (shards / "val-000000.tar").read_bytes()


def test_a_missing_shard_stops_everything(shards: Path, tmp_path: Path, workers: DataWorkers) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    split = open_split(copy, "val")
    (copy / "val-000000.tar").unlink()
    with pytest.raises(UserError, match=r"val-000000.tar: missing; restore the shard"):
        list(whole_split(split, SHAPE, 6, 0, 1, workers))
    with pytest.raises(UserError, match=r"val-000000.tar: missing"):
        split.check_complete()


def test_a_killed_worker_is_named(train: Split) -> None:
    order = Order(train.shard_samples, 0, 8)
    with open_workers(1) as workers:
        batches = training_batches(train, order, SHAPE, 0, 1, 0, workers)
        next(batches)
        (pid,) = workers.pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match=rf"a data worker \(process {pid}\) ended by signal 9"):
            take(batches, 10)


def test_workers_leave_signals_to_training(train: Split) -> None:
    """A scheduler signals every process of a job; training saves, and needs its data until then."""
    order = Order(train.shard_samples, 0, 8)
    with open_workers(1) as workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(workers.pids[0], number)
        assert len(take(training_batches(train, order, SHAPE, 0, 1, 0, workers), 3)) == 3


def test_select_and_length(train: Split, workers: DataWorkers) -> None:
    order = Order(train.shard_samples, 0, 6)
    (batch,) = take(training_batches(train, order, SHAPE, 0, 1, 0, workers), 1)
    part = batch.select(slice(2, 4))
    assert len(part) == 2
    assert (part.keys, part.digests) == (batch.keys[2:4], batch.digests[2:4])
    assert torch.equal(part.images_BCHW, batch.images_BCHW[2:4])


def test_feeding_a_cpu_changes_nothing(train: Split, workers: DataWorkers) -> None:
    order = Order(train.shard_samples, 0, 6)
    batches = take(training_batches(train, order, SHAPE, 0, 1, 0, workers), 3)
    for fed, batch in zip(on_device(batches, torch.device("cpu")), batches, strict=True):
        assert torch.equal(fed.images_BCHW, batch.images_BCHW)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_feeding_a_gpu_gives_the_same_batches(train: Split) -> None:
    order = Order(train.shard_samples, 0, 16)
    device = torch.device("cuda")
    with open_workers(2, pin=True) as workers:
        fed = on_device(training_batches(train, order, SHAPE, 0, 1, 0, workers), device)
        found = [next(fed).images_BCHW.clone() for _ in range(50)]
        plain = training_batches(train, order, SHAPE, 0, 1, 0, workers)
        for images_BCHW in found:
            assert torch.equal(images_BCHW.cpu(), next(plain).images_BCHW)


def test_rows_lie_apart() -> None:
    """The arrays of a batch share no byte."""
    shape = BatchShape(3, SceneShape(5, 2))
    memory = np.zeros(memory_size(shape), np.uint8)
    rows = rows_of(memory, shape)
    for array in rows:
        array.view(np.uint8)[...] += 1
    assert (memory == 1).all()


def test_too_many_objects(train: Split) -> None:
    with pytest.raises(UserError, match="more than --max_program_len 2; raise it"):
        check_fits(train, 2)


def test_unknown_split(shards: Path) -> None:
    with pytest.raises(UserError, match="has no split 'dev'; there are test, train, val"):
        open_split(shards, "dev")


def test_alpha_is_dropped_and_frames_are_squashed(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 255
    path = tmp_path / "rgba.png"
    Image.fromarray(pixels, "RGBA").save(path)
    image = decode_image(path.read_bytes(), 24)
    assert image.shape == (24, 24, 3)
    assert (image == [200, 0, 0]).all()


def test_frames_go_by_way_of_another_size_on_request(shards: Path) -> None:
    split = open_split(shards, "test")
    shape = SceneShape(32, 10, squash_size=16)
    with open_workers(1) as workers:
        (batch,) = whole_split(split, shape, len(split), 0, 1, workers)
    for sample, image_CHW in enumerate(batch.images_BCHW.numpy()):
        data = split.read(sample, "image")
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((16, 16), Image.Resampling.HAMMING)
        expected = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(image_CHW.transpose(1, 2, 0), expected)
        assert not np.array_equal(decode_image(data, 32), expected)


def test_masks_keep_their_ids(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4
    picture = Image.fromarray(ids, "P")
    picture.putpalette([255, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9])  # two ids share a colour
    picture.save(tmp_path / "mask.png")
    assert np.array_equal(decode_mask((tmp_path / "mask.png").read_bytes()), ids)
    picture.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="must hold ids"):
        decode_mask((tmp_path / "rgb.png").read_bytes())


def test_a_shard_that_is_cut_while_it_is_read(shards: Path, tmp_path: Path) -> None:
    """The system kills who looks into a mapped file where it ends no more."""
    copy = shutil.copytree(shards, tmp_path / "copy")
    split = open_split(copy, "train")
    with open_workers(1) as workers:
        batches = training_batches(split, Order(split.shard_samples, 0, 48), SHAPE, 0, 1, 0, workers, ahead=0)
        next(batches)  # all shards are mapped now
        for tar in copy.glob("train-*.tar"):
            os.truncate(tar, 0)
        with pytest.raises(UserError, match=rf"ended by signal 7: a shard was cut .*; run `nsi verify` on {copy}"):
            take(batches, 3)


def test_file_descriptors_may_be_acknowledged(train: Split, tmp_path: Path) -> None:
    """As macOS does, where the answer to a batch must not be taken for one."""
    script = tmp_path / "acknowledging.py"
    script.write_text(
        "import multiprocessing.reduction as reduction, sys\n"
        "reduction.ACKNOWLEDGE = True\n"
        "from shards.loading import workers, worker\n"
        "from shards.loading.loader import training_batches\n"
        "from shards.loading.rows import SceneShape\n"
        "from shards.order import Order\n"
        "from shards.reading.dataset import open_split\n"
        "split = open_split(sys.argv[1], 'train')\n"
        "with workers.open_workers(2) as running:\n"
        "    order = Order(split.shard_samples, 0, 8)\n"
        "    batches = training_batches(split, order, SceneShape(16, 10), 0, 1, 0, running)\n"
        "    kept = [next(batches) for _ in range(6)]\n"
        "print(sum(len(batch) for batch in kept))\n"
    )
    site = tmp_path / "sitecustomize.py"  # the workers, too, acknowledge
    site.write_text("import multiprocessing.reduction as reduction\nreduction.ACKNOWLEDGE = True\n")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    command = [sys.executable, str(script), train.folder]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert found.stdout == "48\n", found.stderr
