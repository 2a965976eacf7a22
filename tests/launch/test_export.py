"""A run's model exported: loads without DeepSpeed, computes what `nsi eval` computes, is whole or not there."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from cluster.checkpoints.folder import checkpoint_path
from launch.cli import run as nsi
from launch.config import TrainConfig, from_json
from launch.evaluate import _embed
from launch.exported import (
    CONFIG,
    MODEL,
    embed_images,
    embed_schemas,
    load_exported,
    primitive_embeddings,
    score,
    slot_embeddings,
)
from launch.training.build import make_backbone, make_model, standing_before
from nsi.backbone import parameters_hash
from nsi.batch import Batch
from nsi.errors import UserError
from nsi.maxsim import maxsim
from nsi.model import Output, load_trained
from shards.loading.loader import whole_split
from shards.loading.rows import SceneShape
from shards.loading.workers import open_workers
from shards.reading.dataset import Split, open_split
from tests.launch.test_resume import checkpointed
from tests.launch.test_training import call, environment

EMPTY = {name: [] for name in ("sizes", "shapes", "materials")}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a small ViT, drawn at random."""
    import timm

    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", img_size=32, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpointed(shards, folder, "--learned_tau", "--score", "mean", "--squash_size", "16", "--seed", 5)
    return folder


def moved(run: Path) -> Path:
    """The run's one checkpoint, its weights no longer those that a model begins with."""
    path = checkpoint_path(run / "checkpoints", 0)
    checkpoint = read_checkpoint(path)
    torch.manual_seed(1)
    for tensor in checkpoint.training.parameters.values():
        tensor.add_(torch.randn_like(tensor), alpha=0.05)
    shutil.rmtree(path)
    return write_checkpoint(run / "checkpoints", checkpoint)


def scenes_of(split: Split, config: TrainConfig) -> Batch:
    shape = SceneShape(config.data.image_size, config.data.max_program_len, config.data.squash_size)
    with open_workers(1) as workers:
        return next(iter(whole_split(split, shape, len(split), 0, 1, workers)))


def evaluated(run: Path, shards: Path) -> tuple[Output, Batch]:
    """What `nsi eval` computes of the validation scenes."""
    checkpoint = read_checkpoint(checkpoint_path(run / "checkpoints", 0))
    config = from_json(TrainConfig, checkpoint.facts["config"])
    split = open_split(str(shards), "val")
    backbone = make_backbone(config.backbone, config.data.image_size)
    model = make_model(config, split.manifest.vocabulary, backbone)
    load_trained(model, checkpoint.training.parameters)
    batch = scenes_of(split, config)
    with torch.inference_mode():
        return _embed(model.eval(), standing_before(config.backbone, backbone), batch, config.optim.seed), batch


@pytest.mark.parametrize("kind", ["dct", "frozen", "trained"])
def test_it_computes_what_eval_computes_bit_for_bit(kind: str, shards: Path, vit: Path, tmp_path: Path) -> None:
    flags = () if kind == "dct" else ("--backbone", "test_vit", "--backbone_weights", str(vit))
    more = ("--backbone_trainable",) if kind == "trained" else ("--learned_tau", "--squash_size", "16")
    checkpointed(shards, tmp_path / "run", *flags, *more, "--seed", 5)
    weights = read_checkpoint(moved(tmp_path / "run")).training.parameters
    assert nsi(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out" / MODEL)
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())
    assert any(name.startswith("backbone.") for name in written) == (kind == "trained")

    exported = load_exported(tmp_path / "out", vit if kind == "frozen" else None)
    expected, batch = evaluated(tmp_path / "run", shards)
    slots_BNE = slot_embeddings(exported, batch.images_BCHW, batch.sample_ids_B)
    assert torch.equal(slots_BNE, expected.slot_embeddings_BNE)
    primitives = primitive_embeddings(exported, batch.labels_BT3, batch.positions_BT3, batch.objects_BT)
    assert torch.equal(primitives.embeddings_CTE, expected.primitive_embeddings_BTE)
    assert torch.equal(primitives.objects_CT, batch.objects_BT)
    said = json.loads((tmp_path / "out" / CONFIG).read_text())["backbone"]
    assert (said["image_size"], said["trained"]) == (32, kind == "trained")
    if kind == "frozen":
        assert said["hash"] == parameters_hash(exported.backbone)
        assert said["mean"] == exported.backbone.get_buffer("mean_C11").flatten().tolist()


ALONE = """
import sys
from pathlib import Path
from launch.exported import embed_images, embed_schemas, load_exported, score
exported = load_exported(sys.argv[1])
names = exported.vocabulary.names()
schema = [(*(each[0] for each in names), (0.5, -1.0, 0.3)), (*(each[-1] for each in names), (1.5, 0.0, 0.3))]
slots = embed_images(exported, [Path(sys.argv[2]).read_bytes()])
scores = score(exported, slots, embed_schemas(exported, [schema, schema[:1]]))
assert scores.shape == (1, 2) and scores.isfinite().all(), scores
assert not [name for name in sys.modules if name.partition(".")[0] in ("deepspeed", "accelerate", "timm")]
"""


def test_it_loads_and_scores_without_deepspeed(run: Path, scenes: Path, tmp_path: Path) -> None:
    assert nsi(["export", str(run), str(tmp_path / "out")]) == 0
    picture = next(path for path in sorted(scenes.rglob("*.png")) if "mask" not in path.name)
    found = call(sys.executable, "-c", ALONE, str(tmp_path / "out"), str(picture), env=environment())
    assert found.returncode == 0, found.stderr


def test_scores_of_scenes_in_their_own_words(run: Path, shards: Path, tmp_path: Path) -> None:
    """From bytes and names: the pixels, ids and positions that training reads, and each pair's score by itself."""
    assert nsi(["export", str(run), str(tmp_path / "out"), "--checkpoint", "last"]) == 0
    exported = load_exported(tmp_path / "out")
    split = open_split(str(shards), "val")
    config = from_json(TrainConfig, read_checkpoint(checkpoint_path(run / "checkpoints", 0)).facts["config"])
    batch = scenes_of(split, config)
    images = [split.decode(sample, "image", bytes) for sample in batch.sample_ids_B.tolist()]
    schemas = [
        [
            (*split.manifest.vocabulary.decode(*labels), position)
            for labels, position, there in zip(
                batch.labels_BT3[row].tolist(), batch.positions_BT3[row].tolist(), batch.objects_BT[row], strict=True
            )
            if there
        ]
        for row in range(len(images))
    ]
    found = score(exported, embed_images(exported, images), embed_schemas(exported, schemas))
    slots_ANE = slot_embeddings(exported, batch.images_BCHW, torch.zeros_like(batch.sample_ids_B))
    primitives_CTE, _ = primitive_embeddings(exported, batch.labels_BT3, batch.positions_BT3, batch.objects_BT)
    assert torch.equal(found, maxsim(slots_ANE, primitives_CTE, batch.objects_BT, "mean"))
    alone = score(exported, embed_images(exported, images[1:2]), embed_schemas(exported, schemas[3:4]))
    assert alone.item() == pytest.approx(found[1, 3].item(), rel=1e-5)
    with pytest.raises(UserError, match="unknown material 'cheese'"):
        embed_schemas(exported, [[(*schemas[0][0][:2], "cheese", (0.0, 0.0, 0.0))]])
    with pytest.raises(UserError, match="schema 0 has 99 objects"):
        embed_schemas(exported, [schemas[0][:1] * 99])


def test_nothing_is_overwritten(run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)  # an empty folder is none
    assert nsi(["export", str(run), str(out)]) == 0
    assert nsi(["export", str(run), str(out)]) == 0  # the same once more
    checkpointed(shards, tmp_path / "other", "--seed", 6)
    before = (out / MODEL).read_bytes()
    capsys.readouterr()
    assert nsi(["export", str(tmp_path / "other"), str(out)]) == 1
    assert f"nsi export: {out}: is there already with other content" in capsys.readouterr().err
    assert (out / MODEL).read_bytes() == before
    (tmp_path / "file").write_text("in the way")
    assert nsi(["export", str(run), str(tmp_path / "file")]) == 1
    assert (tmp_path / "file").read_text() == "in the way"
    (out / "notes.txt").write_text("mine")
    assert nsi(["export", str(run), str(out)]) == 1
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing is left aside


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, status, line in [
        ([tmp_path / "none"], 1, "no such run folder"),
        ([run, "--checkpoint", "9"], 1, "step-00000009: no such checkpoint"),
        ([run, "--checkpoint", "newest"], 2, "give best, last or the number of a step"),
    ]:
        assert nsi(["export", str(arguments[0]), str(tmp_path / "out"), *map(str, arguments[1:])]) == status
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_loaded(shards: Path, vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_exported(tmp_path / "none")
    checkpointed(shards, tmp_path / "run", "--backbone", "test_vit", "--backbone_weights", str(vit))
    out = tmp_path / "out"
    assert nsi(["export", str(tmp_path / "run"), str(out)]) == 0
    others = {name: tensor + 1 for name, tensor in torch.load(vit).items()}
    torch.save(others, tmp_path / "others.pt")
    with pytest.raises(UserError, match="was trained on other weights of test_vit"):
        load_exported(out, tmp_path / "others.pt")
    config = json.loads((out / CONFIG).read_text())
    for change, line in [
        ({"format": 2}, "format 2, but this version reads 1"),
        ({"vocabulary": EMPTY}, "model.safetensors: does not fit config.json"),
    ]:
        (out / CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=line):
            load_exported(out, vit)
    (out / CONFIG).write_text(json.dumps(config))
    data = bytearray((out / MODEL).read_bytes())
    data[-1] ^= 1
    (out / MODEL).write_bytes(data)
    with pytest.raises(UserError, match="does not have the checksum in config.json"):
        load_exported(out, vit)
    (out / CONFIG).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_exported(out, vit)
