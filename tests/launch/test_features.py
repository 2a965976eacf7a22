"""The feature store: it holds the backbone's features, refuses what does not fit, and goes on to the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load

from launch.config import TrainConfig
from launch.train import parse
from launch.training.prepare import Parts, prepare
from nsi.backbone import build_backbone, parameters_hash
from nsi.errors import UserError
from nsi.tokens import unpack
from shards.decode import decode_image
from shards.index import index_path
from shards.loading.loader import refuse_faults, whole_split
from shards.loading.rows import SceneShape
from shards.loading.workers import open_workers
from shards.manifest import read_manifest
from shards.reading.dataset import Split, open_split, splits_of
from shards.reading.storage import open_storage
from tests.launch.outside import contents, done, nsi, refused
from tests.launch.test_training import ROOT, SMALL, call, environment
from tests.making import make_shards
from tests.shards.servers import file_server

SIZE = 32
FLAGS = ("--backbone", "dct", "--image_size", SIZE, "--num_workers", 1, "--batch_size", 10)


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="module")
def store(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of all train and val scenes, in bf16."""
    return write(shards, tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def int8(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in int8."""
    return write(shards, tmp_path_factory.mktemp("data") / "int8", "--storage", "int8")


def write(shards: Path, out: Path, *more: object) -> Path:
    done(nsi("features", shards, out, *FLAGS, *more))
    return out


def opened(store: Path, split: str) -> Split:
    (found,) = splits_of(open_storage(store), read_manifest(store), [split], None)
    return found


def truth(shards: Path, place: int) -> dict[str, torch.Tensor]:
    """The backbone's features of a shard of ten scenes, by key."""
    split = open_split(shards, "train")
    ids = range(10 * place, 10 * place + 10)
    images = np.stack([split.decode(i, "image", lambda data: decode_image(data, SIZE)) for i in ids])
    features_BPF = build_backbone("dct", SIZE)(torch.from_numpy(images).permute(0, 3, 1, 2))
    return dict(zip(map(split.key, ids), features_BPF, strict=True))


# --- what a store holds ---


def test_plain_webdataset_and_safetensors_read_it(shards: Path, store: Path) -> None:
    """The same keys in the same order, and the backbone's features rounded once."""
    expected, source = truth(shards, 1), open_split(shards, "train")
    found = list(webdataset.WebDataset(str(store / "train-000001.tar"), shardshuffle=False))
    assert [each["__key__"] for each in found] == list(expected)
    for number, each in enumerate(found):
        features_PF = load(each["features.safetensors"])["features"]
        assert torch.equal(features_PF, expected[each["__key__"]].bfloat16())
        assert each["json"] == source.read(10 + number, "json")


def test_int8_is_within_half_a_step(shards: Path, int8: Path) -> None:
    expected = truth(shards, 2)
    for each in webdataset.WebDataset(str(int8 / "train-000002.tar"), shardshuffle=False):
        tensors = load(each["features.safetensors"])
        error_PF = unpack(tensors["features"], tensors["scales"]) - expected[each["__key__"]]
        assert (error_PF.abs() <= tensors["scales"][:, None] * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_the_manifest_tells_what_it_costs(shards: Path, request: pytest.FixtureRequest, storage: str) -> None:
    """The error over every scene, measured again here from what the store gives."""
    folder: Path = request.getfixturevalue({"bf16": "store", "int8": "int8"}[storage])
    errors, features = [], []
    for name in ("train", "val"):
        images, stored = batches(open_split(shards, name)), batches(opened(folder, name))
        backbone = build_backbone("dct", SIZE)
        for image_batch, batch in zip(images, stored, strict=True):
            rows_B = batch.rows_B
            features.append(backbone(image_batch.images_BCHW)[rows_B].double())
            errors.append(unpack(batch.features_BPF, batch.feature_scales_BP)[rows_B] - features[-1])
    error, rms = torch.cat(errors), torch.cat(features).square().mean().sqrt()
    facts = read_manifest(folder).features
    assert facts is not None
    assert facts.relative_rms_error == pytest.approx(float(error.square().mean().sqrt() / rms), rel=1e-3)
    assert facts.largest_error == pytest.approx(float(error.abs().max() / rms), rel=1e-3)
    assert (facts.storage, facts.grid, facts.feature_dim) == (storage, (4, 4), 43)
    assert facts.backbone_hash == parameters_hash(backbone)
    assert facts.relative_rms_error < {"bf16": 0.003, "int8": 0.02}[storage]


def batches(split: Split) -> list:
    shape = split.manifest.features.shape if split.manifest.features else None
    with open_workers(1) as workers:
        scene = SceneShape(0 if shape else SIZE, 10, tokens=shape)
        return list(map(refuse_faults, whole_split(split, scene, 10, 0, 1, workers)))


def test_rows_are_those_of_the_shards_but_for_images(shards: Path, store: Path) -> None:
    """Ids, keys, schemas and digests: `nsi audit` and resumed runs see no difference."""
    for ours, theirs in zip(batches(opened(store, "train")), batches(open_split(shards, "train")), strict=True):
        assert (ours.keys, ours.digests) == (theirs.keys, theirs.digests)
        for name in ("sample_ids_B", "rows_B", "labels_BT3", "positions_BT3", "objects_BT"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.images_BCHW.numel() == 0
        assert not ours.features_BPF[~ours.rows_B].any()


def test_verify_checks_a_store(store: Path, int8: Path, tmp_path: Path) -> None:
    assert "54 samples, all as they were written" in done(nsi("verify", store, "--workers", 1))
    assert "54 samples, all as they were written" in done(nsi("verify", int8, "--workers", 1))
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    flip(copy, "train", 13)
    said = nsi("verify", copy, "--workers", 1)
    assert f"{copy}: 2 faults; restore what is named above, or make the store anew in another folder" in refused(said)
    assert "train-000001.tar: image of" in said.out


# --- writing ---


def test_parts_and_interruptions_give_the_same_bytes(shards: Path, store: Path, tmp_path: Path) -> None:
    """A part, then a run whose disk is full, then what is left; beside it parts in any order."""
    out = tmp_path / "cut"
    assert "part 2/3 is done" in done(nsi("features", shards, out, *FLAGS, "--part", "2/3"))
    before = contents(out)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    code = f"{limit}from launch.cli import main; main()"
    command = [sys.executable, "-c", code, "features", shards, out, *FLAGS]
    found = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert found.returncode == 1
    assert "cannot be written (File too large); mend that and run the same command again" in found.stderr
    assert found.stderr.count("nsi features:") == 1
    assert {name: data for name, data in contents(out).items() if name in before} == before
    assert not list(out.glob("*.tmp"))
    assert contents(write(shards, out)) == contents(store)
    for part in ("3/3", "1/3", "2/3"):
        done(nsi("features", shards, tmp_path / "parts", *FLAGS, "--part", part))
    assert contents(tmp_path / "parts") == contents(store)


def test_a_complete_store_is_left_as_it_is(shards: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    assert "off by 0.00" in done(nsi("features", shards, store, *FLAGS))
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == before


def test_other_folders_are_not_written_to(shards: Path, scenes: Path, store: Path, tmp_path: Path) -> None:
    for out, said in (
        (scenes, "is not empty and holds no shards"),
        (shards, "holds shards of images; choose another folder"),
        (Path(__file__), "is a file"),
    ):
        assert said in refused(nsi("features", shards, out, *FLAGS))
    said = refused(nsi("features", shards, store, *FLAGS, "--storage", "int8"))
    assert "holds other features (storage bf16, not int8)" in said
    assert "holds the shards of other scenes or settings" in refused(nsi("shard", scenes, store, "--workers", 1))
    done(nsi("features", shards, tmp_path / "begun", *FLAGS, "--part", "1/2"))
    said = refused(nsi("features", shards, tmp_path / "begun", *FLAGS, "--image_size", 64))
    assert "was begun with other features (transform 32x32, not 64x64" in said
    assert "don't split into dct's patches" in refused(nsi("features", shards, tmp_path / "no", *FLAGS[:3], 33))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "given",
    ["--part 3/2", "--batch_size 0", "--num_workers 0", "--image_size 0", "--patch_size 0 --backbone dct"],
)
def test_wrong_usage(shards: Path, tmp_path: Path, given: str) -> None:
    assert given.split()[0] in refused(nsi("features", shards, tmp_path / "out", *given.split()), status=2)


# --- what does not fit a run ---


def prepared(shards: Path, store: object, run: Path, *more: object) -> Parts:
    given = ["--data_path", shards, "--log_path", run, *SMALL, "--features", store, *more]
    config: TrainConfig = parse([str(each) for each in given])
    return prepare(config, True, True, None)


def test_a_store_that_fits(shards: Path, store: Path, tmp_path: Path) -> None:
    parts = prepared(shards, store, tmp_path / "run")
    assert parts.backbone_hash == parameters_hash(build_backbone("dct", SIZE))
    assert (parts.backbone.grid, parts.backbone.feature_dim) == ((4, 4), 43)
    assert parts.train.manifest.features is None  # order, ledger and checkpoints go by the shards


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--image_size 64", "was made with images 32x32, this run has 64x64"),
        ("--squash_size 16", "was made with images 32x32, this run has 32x32 by way of 16x16"),
        ("--patch_size 4", "was made by a dct with other weights or patches"),
        ("--backbone vit_tiny_patch16_224", "was made with --backbone dct, this run has vit_tiny_patch16_224"),
    ],
)
def test_another_backbone_is_refused(shards: Path, store: Path, tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^{store}: {said}"):
        prepared(shards, store, tmp_path / "run", *more.split())


def test_other_data_are_refused(scenes: Path, shards: Path, store: Path, tmp_path: Path) -> None:
    make_shards(scenes, tmp_path / "others", shard_samples=12)
    with pytest.raises(UserError, match="was made of other shards"):
        prepared(tmp_path / "others", store, tmp_path / "run")
    with pytest.raises(UserError, match="holds images, not features"):
        prepared(shards, shards, tmp_path / "run")
    with pytest.raises(UserError, match="a feature store; give it to --features"):
        prepared(store, store, tmp_path / "run")


def test_a_store_that_is_not_whole_is_refused(shards: Path, store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    (copy / "train-000003.tar").unlink()
    with pytest.raises(UserError, match="copy/train-000003.tar: missing; restore it"):
        prepared(shards, copy, tmp_path / "run")
    assert "copy/train-000003.tar: missing; restore it" in refused(nsi("features", shards, copy, *FLAGS))
    done(nsi("features", shards, tmp_path / "half", *FLAGS, "--part", "1/2"))
    with pytest.raises(UserError, match="half: a feature store that is not complete; run its `nsi features` again"):
        prepared(shards, tmp_path / "half", tmp_path / "run")
    with pytest.raises(UserError, match="none/manifest.json: missing"):
        prepared(shards, tmp_path / "none", tmp_path / "run")


def flip(store: Path, split: str, number: int):
    """Flips a bit in the features of a sample. Returns where they lie."""
    (found,) = opened(store, split).locate([number])
    path = store / found.span.shard
    data = bytearray(path.read_bytes())
    data[found.image.offset + found.image.size - 3] ^= 1
    path.write_bytes(data)
    return found


def test_damaged_features_are_a_fault(store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    broken = flip(copy, "val", 2)
    split = opened(copy, "val")
    with open_workers(1) as workers:
        (batch,) = whole_split(split, SceneShape(0, 10, tokens=split.source.features), 6, 0, 1, workers)
    assert batch.rows_B.tolist() == [True, True, False, True, True, True]
    (fault,) = batch.faults
    assert f"features of {broken.key} at offset {broken.image.offset} does not have its checksum" in fault.text
    assert not batch.features_BPF[2].any()


def test_features_of_another_scene_are_a_fault(store: Path, tmp_path: Path) -> None:
    """Two scenes' features exchanged, and the index made to agree: what a member says of itself decides."""
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    split = opened(copy, "val")
    index = index_path(copy / "val-000000.tar")
    records = np.load(index)
    records["image"][[0, 1]] = records["image"][[1, 0]]
    np.save(index, records)
    from shards.loading.rows import BatchShape, fill_row, memory_size, rows_of
    from shards.reading.dataset import _Index, _samples

    shape = BatchShape(1, SceneShape(0, 10, tokens=split.source.features))
    rows = rows_of(np.zeros(memory_size(shape), np.uint8), shape)
    (sample,) = _samples(_Index.of(split.table[0], records), np.array([0]), [0])
    whole = sample._replace(span=sample.span._replace(offset=0))
    data = (copy / "val-000000.tar").read_bytes()
    with pytest.raises(UserError, match=f"features of {sample.key} at offset .* cannot be decoded .they are those of"):
        fill_row(rows, 0, whole, data, split.source)


# --- training ---


def train(shards: Path, run: Path, *more: object, ranks: int = 1) -> list[dict]:
    """Trains in real processes, and returns the logged lines."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(ranks)]
    start = [sys.executable, "-m", "launch", "train"] if ranks == 1 else [*torchrun, "launch/train.py"]
    slow = ("--lr", "1e-5")  # rounding grows as in any training, so that steps would differ by more than the storage
    found = call(*start, "--data_path", str(shards), "--log_path", str(run), *SMALL, *slow, *map(str, more))
    assert found.returncode == 0, found.stdout + found.stderr
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_close(ours: list[dict], theirs: list[dict], rel: float) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "contrastive", "reconstruction"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=rel), name
    assert [line["loss"] for line in ours] != [line["loss"] for line in theirs]  # it was the store that was read


@pytest.fixture(scope="module")
def from_images(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The lines of a run without a store."""
    return train(shards, tmp_path_factory.mktemp("runs") / "images")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "storage", "ranks", "rel"), [("store", "bf16", 2, 1e-3), ("int8", "int8", 1, 5e-3)])
def test_the_same_losses_and_no_image_is_read(
    shards: Path, from_images: list[dict], request: pytest.FixtureRequest, tmp_path: Path,
    kind: str, storage: str, ranks: int, rel: float,
) -> None:  # fmt: skip
    """The train tars are gone, and each val image is damaged: only their pictures in TensorBoard are black."""
    bare = Path(shutil.copytree(shards, tmp_path / "bare", ignore=shutil.ignore_patterns("*.tar")))
    (bare / "val-000000.tar").write_bytes(bytes((shards / "val-000000.tar").stat().st_size))
    run = tmp_path / "run"
    lines = train(bare, run, "--features", request.getfixturevalue(kind), ranks=ranks)
    check_close(lines, from_images, rel)
    assert "proven: every sample was read exactly once an epoch" in done(nsi("audit", run))
    assert json.loads((run / "config.json").read_text())["features"]["storage"] == storage
    done(nsi("eval", run, "--data_path", shards))  # by the backbone, from images


@pytest.mark.slow
def test_a_vit(shards: Path, tmp_path: Path) -> None:
    """Whose weights come from a file: other ones are refused, and none at all."""
    import timm

    flags: list[object] = ["--backbone", "vit_tiny_patch16_224", "--image_size", 64, "--backbone_weights"]
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        torch.save(model.state_dict(), tmp_path / f"weights-{seed}.pt")
    ours, others = tmp_path / "weights-0.pt", tmp_path / "weights-1.pt"
    done(nsi("features", shards, tmp_path / "store", *flags, ours, "--num_workers", 1))
    with_images = train(shards, tmp_path / "images", *flags, ours, "--max_steps", 3)
    with_store = train(shards, tmp_path / "stored", *flags, ours, "--max_steps", 3, "--features", tmp_path / "store")
    check_close(with_store, with_images, 1e-3)
    with pytest.raises(UserError, match="was made by a vit_tiny_patch16_224 with other weights"):
        prepared(shards, tmp_path / "store", tmp_path / "run", *flags, others)
    with pytest.raises(UserError, match="was made with --backbone_weights; give the same file"):
        prepared(shards, tmp_path / "store", tmp_path / "run", *flags[:-1])
    with pytest.raises(UserError, match="was made with images 64x64, normalization timm, this run has 64x64, normaliz"):
        prepared(shards, tmp_path / "store", tmp_path / "run", *flags, ours, "--normalization", "none")


@pytest.mark.slow
def test_a_run_may_change_between_store_and_images(shards: Path, store: Path, tmp_path: Path) -> None:
    train(shards, tmp_path / "run", "--max_steps", 2)
    train(shards, tmp_path / "run", "--features", store)
    assert "proven: every sample was read exactly once an epoch" in done(nsi("audit", tmp_path / "run"))


@pytest.mark.slow
def test_a_store_behind_http_through_a_cache(shards: Path, store: Path, tmp_path: Path) -> None:
    """The store alone is fetched, each shard once; a copy that the disk damages is fetched anew."""
    at_home = train(shards, tmp_path / "home", "--features", store)
    with pytest.MonkeyPatch.context() as patch, file_server() as web:
        patch.setenv("no_proxy", "127.0.0.1")
        web.files = {f"store/{path.name}": path.read_bytes() for path in store.iterdir()}
        cache = ("--cache_path", tmp_path / "cache")
        far = train(shards, tmp_path / "far", "--features", f"{web.url}/store", *cache)
        assert [line["loss"] for line in far] == [line["loss"] for line in at_home]
        tars = sorted(path.name for path in store.glob("*.tar"))
        assert {name: web.asked(f"store/{name}") for name in tars} == dict.fromkeys(tars, 1)
        (copy,) = tmp_path.glob("cache/*/train-000000.tar")
        data, (sample,) = bytearray(copy.read_bytes()), opened(store, "train").locate([3])
        data[sample.image.offset + sample.image.size - 1] ^= 1
        copy.write_bytes(data)
        again = train(shards, tmp_path / "again", "--features", f"{web.url}/store", *cache)
        assert [line["loss"] for line in again] == [line["loss"] for line in at_home]
        assert web.asked("store/train-000000.tar") == 2
