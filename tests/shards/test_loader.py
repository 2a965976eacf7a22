"""The loader: any number of ranks gives the same global batches, from any step, with the right content."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nsi.errors import UserError
from shards.dataset import Split, open_split
from shards.decode import decode_image, decode_mask, decode_schema
from shards.loader import BatchShape, check_fits, training_batches, whole_split
from shards.order import Order

SHAPE = BatchShape(image_size=32, max_objects=10)


@pytest.fixture(scope="module")
def train(shards: Path) -> Split:
    return open_split(shards, "train")


def take(batches, count: int) -> list:
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_together_give_the_order(train: Split, world: int) -> None:
    order = Order(train.shard_samples, 3, 14)
    ranks = [take(training_batches(train, order, SHAPE, rank, world, 2, workers=2), 3) for rank in range(world)]
    for place, step in enumerate(range(2, 5)):
        batches = [rank[place] for rank in ranks]
        assert len({len(batch) for batch in batches}) == 1  # ranks always have equally many rows
        ids = torch.cat([batch.sample_ids_B[batch.rows_B] for batch in batches])
        assert ids.tolist() == order.batch(step).tolist()
        for batch in batches:
            for row in range(len(batch)):
                sample = int(batch.sample_ids_B[row])
                assert batch.keys[row] == (train.key(sample) if sample >= 0 else "")


def test_rows_hold_their_scenes(train: Split) -> None:
    order = Order(train.shard_samples, 0, 5)
    (batch,) = take(training_batches(train, order, SHAPE, 0, 1, 0, workers=1), 1)
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


def test_empty_rows_are_empty(train: Split) -> None:
    order = Order(train.shard_samples, 0, 5)
    (batch,) = take(training_batches(train, order, SHAPE, 0, 2, 0, workers=1), 1)  # 2 of 3 rows
    assert batch.rows_B.tolist() == [True, True, False]
    assert batch.sample_ids_B[2] == -1
    assert not batch.images_BCHW[2].any()
    assert not batch.objects_BT[2].any()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_whole_split_has_every_scene_once(shards: Path, world: int) -> None:
    split = open_split(shards, "val")
    ranks = [list(whole_split(split, SHAPE, 4, rank, world, workers=1)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1  # all ranks take part in equally many collectives
    ids = [i for rank in ranks for batch in rank for i in batch.sample_ids_B[batch.rows_B].tolist()]
    assert sorted(ids) == list(range(len(split)))


def test_select_and_length(train: Split) -> None:
    order = Order(train.shard_samples, 0, 6)
    (batch,) = take(training_batches(train, order, SHAPE, 0, 1, 0, workers=1), 1)
    part = batch.select(slice(2, 4))
    assert len(part) == 2
    assert part.keys == batch.keys[2:4]
    assert torch.equal(part.images_BCHW, batch.images_BCHW[2:4])


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


def test_masks_keep_their_ids(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4
    picture = Image.fromarray(ids, "P")
    picture.putpalette([255, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9])  # two ids share a colour
    picture.save(tmp_path / "mask.png")
    assert np.array_equal(decode_mask((tmp_path / "mask.png").read_bytes()), ids)
    picture.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="must hold ids"):
        decode_mask((tmp_path / "rgb.png").read_bytes())
