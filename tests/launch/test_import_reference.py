"""A checkpoint of the public code becomes a run: the same numbers, by our ids, and one line for what does not fit."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cluster.checkpoints.checkpoint import read_checkpoint
from launch import cli
from launch.config import TrainConfig, from_json
from launch.training.build import make_backbone, make_model
from launch.training.validation import VALIDATION_STEP
from nsi.metrics.retrieval import retrieval, schema_groups
from nsi.model import Output
from nsi.noise import KeyedNoise
from shards.loading.loader import whole_split
from shards.loading.rows import SceneShape
from shards.loading.workers import open_workers
from shards.reading.dataset import Split, open_split
from tests.launch import public_checkpoint as public

FLAGS = [
    *("--backbone", public.VIT, "--num_slots", str(public.SLOTS), "--num_iterations", str(public.ITERATIONS)),
    *("--num_heads", str(public.HEADS)),
]
EPOCH = {"epoch": 3, "best_val_loss": 1.5, "optimizer": {"state": {}, "param_groups": [{"lr": 4e-4}]}}


@pytest.fixture(scope="module")
def state() -> public.State:
    return public.make_state()


@pytest.fixture(scope="module")
def split(shards: Path) -> Split:
    return open_split(str(shards), "test")


@pytest.fixture(scope="module")
def source(state: public.State, split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user of the public code has: best_model.pt with program2label.json beside it."""
    folder = tmp_path_factory.mktemp("public")
    torch.save(state, folder / "best_model.pt")
    (folder / "program2label.json").write_text(json.dumps(public.make_names(split.manifest.vocabulary)))
    return folder


@pytest.fixture(scope="module")
def imported(source: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "imported"
    assert nsi("import-reference", source / "best_model.pt", run, "--data_path", shards, *FLAGS) == 0
    return run


def nsi(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def embeddings(run: Path, split: Split) -> Output:
    """What our model, loaded as evaluation loads it, makes of the whole split."""
    checkpoint = read_checkpoint(run / "checkpoints" / "step-00000000")
    trained = from_json(TrainConfig, checkpoint.facts["config"])
    backbone = make_backbone(trained.backbone, trained.data.image_size)
    model = make_model(trained, split.manifest.vocabulary, backbone).eval()
    model.load_state_dict(checkpoint.training.parameters)
    shape = SceneShape(trained.data.image_size, trained.data.max_program_len, trained.data.squash_size)
    with open_workers(1) as workers, torch.no_grad():
        (batch,) = whole_split(split, shape, len(split), 0, 1, workers)
        noise = KeyedNoise(trained.optim.seed, VALIDATION_STEP, batch.sample_ids_B)
        return model(backbone(batch.images_BCHW), batch.labels_BT3, batch.positions_BT3, batch.objects_BT, noise)


def truth(state: public.State, source: Path, split: Split) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list]:
    """slot_embeddings_BNE and primitive_embeddings_BTE by the public computation, lengths_B, and the scenes' JSONs."""
    scenes = [json.loads(split.read(sample, "json"))["scene"] for sample in range(len(split))]
    pictures = [Image.open(io.BytesIO(split.read(sample, "image"))) for sample in range(len(split))]
    ids = json.loads((source / "program2label.json").read_text())
    labels_BT6 = torch.zeros(len(split), 10, 6)
    for scene, rows in zip(scenes, labels_BT6, strict=True):
        for place, each in enumerate(scene["objects"]):
            labels = [ids[f"{kind}s"][each[kind]] for kind in ("size", "shape", "material")]
            rows[place] = torch.tensor([*labels, *each["3d_coords"]])
    noise_BND = KeyedNoise(0, VALIDATION_STEP, torch.arange(len(split))).normal("slots", (public.SLOTS, 32))
    with torch.no_grad():
        slots_BNE = public.slot_embeddings(state, public.features(state, pictures), noise_BND)
        primitives_BTE = public.primitive_embeddings(state, labels_BT6)
    return slots_BNE, primitives_BTE, torch.tensor([len(scene["objects"]) for scene in scenes]), scenes


def test_embeddings_are_those_of_the_public_computation(
    imported: Path, state: public.State, source: Path, split: Split
) -> None:
    """Ids stand in another order there, its padding is another object, and pictures go by way of 128 pixels."""
    slots_BNE, primitives_BTE, lengths_B, _ = truth(state, source, split)
    output = embeddings(imported, split)
    assert torch.allclose(output.slot_embeddings_BNE, slots_BNE, rtol=1e-4, atol=1e-5)
    real_BT = torch.arange(10) < lengths_B[:, None]
    assert not bool(real_BT.all())  # there is padding to attend to
    assert torch.allclose(output.primitive_embeddings_BTE[real_BT], primitives_BTE[real_BT], rtol=1e-4, atol=1e-5)
    ids = json.loads((source / "program2label.json").read_text())
    ours = split.manifest.vocabulary
    for names, kind in zip(ours.names(), ("sizes", "shapes", "materials"), strict=True):
        assert [ids[kind][name] for name in names] != list(range(len(names)))  # so that the order did matter


def test_evaluation_and_report_run_on_it(
    imported: Path, state: public.State, source: Path, shards: Path, split: Split, tmp_path: Path
) -> None:
    moved = shutil.copytree(imported, tmp_path / "moved")  # its backbone moves with it
    assert nsi("eval", moved, "--split", "test", "--num_workers", "1") == 0
    assert nsi("report", moved) == 0
    assert public.VIT in (moved / "report.html").read_text()
    slots_BNE, primitives_BTE, lengths_B, _ = truth(state, source, split)
    best_BBT = torch.einsum("ine,jte->ijnt", slots_BNE, primitives_BTE).amax(dim=2)
    scores_BB = best_BBT.masked_fill(torch.arange(10) >= lengths_B[:, None], 0.0).sum(dim=-1)
    labels_ST3 = torch.arange(len(split))[:, None, None].expand(-1, 1, 3)  # no two scenes are alike
    groups_S = schema_groups(labels_ST3, torch.ones(len(split), 1, dtype=torch.bool), torch.zeros(len(split), 1, 3))
    written = json.loads((moved / "eval-test.json").read_text())
    assert written["retrieval"] == retrieval(scores_BB, groups_S).as_dict()
    assert written["step"] == 0


def test_checkpoint_pt_tar_of_many_gpus(
    state: public.State, source: Path, shards: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wrapped = {module: {f"module.{key}": value for key, value in part.items()} for module, part in state.items()}
    torch.save({**EPOCH, **wrapped}, tmp_path / "checkpoint.pt.tar")
    names = ["--program2label", source / "program2label.json"]
    file, run = tmp_path / "checkpoint.pt.tar", tmp_path / "run"
    assert nsi("import-reference", file, run, *names, "--data_path", shards, *FLAGS) == 0
    assert "passed over in" in (out := capsys.readouterr().out)
    assert "epoch, best_val_loss, optimizer" in out
    ours, theirs = (read_checkpoint(each / "checkpoints" / "step-00000000").training for each in (run, imported))
    assert all(torch.equal(ours.parameters[name], value) for name, value in theirs.parameters.items())


def test_without_shards_every_name_is_kept(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    assert nsi("import-reference", source / "best_model.pt", run, *FLAGS) == 0
    facts = read_checkpoint(run / "checkpoints" / "step-00000000").facts
    assert [len(names) for names in facts["vocabulary"].values()] == [3, 4, 60]
    assert nsi("eval", run) == 2
    assert "names no shards; give --data_path" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of a failed import."""
    status = nsi("import-reference", *arguments, *FLAGS)
    err = capsys.readouterr().err
    assert status == 1
    assert err.count("\n") == 1
    return err


def without(key: str):
    return lambda state: state["slot_encoder"].pop(key)


def without_backbone(state: public.State) -> None:
    state["slot_encoder"] = {k: v for k, v in state["slot_encoder"].items() if not k.startswith("encoder.")}


def put(module: str, key: str, shape: tuple[int, ...], value: float = 0.0):
    return lambda state: state[module].update({key: torch.full(shape, value)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("norm_embed.bias"), "lacks slot_encoder.norm_embed.bias, whose shape would be (16,)"),
        (without("embed_proj.weight"), "lacks slot_encoder.embed_proj.weight"),
        (without("encoder.norm.weight"), "the weights for test_vit lack 'norm.weight'"),
        (without("encoder.patch_embed.proj.weight"), "lacks slot_encoder.encoder.patch_embed.proj.weight"),
        (put("slot_encoder", "decoder.mlp.8.bias", (2,)), "has slot_encoder.decoder.mlp.8.bias of the shape (2,)"),
        (
            put("slot_encoder", "decoder.mlp.6.weight", (66, 24)),
            "slot_encoder.decoder.mlp.6.weight has the shape (66, 24), this model wants (65, 24)",
        ),
        (
            put("slot_encoder", "encoder.patch_embed.proj.bias", (63,)),
            "'patch_embed.proj.bias' has the shape (63,), the model wants (64,)",
        ),
        (
            put("slot_encoder", "decoder.postional_encoding.weight", (15, 32)),
            "slot_encoder.decoder.postional_encoding.weight has 15 rows, which are no square",
        ),
        (
            put("slot_encoder", "decoder.mlp.0.weight", ()),
            "decoder.mlp.0.weight has the shape (), this model wants (24,",
        ),
        (
            put("slot_encoder", "embed_proj.weight", (16, 31)),
            "slot_encoder.embed_proj.weight has the shape (16, 31), this",
        ),
        (
            put("slot_encoder", "embed_proj.weight", (17, 32)),
            "slot_encoder.embed_proj.weight has the shape (17, 32), this",
        ),
        (put("slot_encoder", "norm_embed.weight", (17,)), "slot_encoder.norm_embed.weight has the shape (17,), this"),
        (
            put("slot_encoder", "slot_attn.slot_mu", (1, 1, 31)),
            "slot_attn.slot_mu has the shape (1, 1, 31), this model",
        ),
        (put("program_encoder", "size_embedding.weight", (3, 31)), "size_embedding.weight has the shape (3, 31), this"),
        (put("program_encoder", "size_embedding.weight", ()), "lacks program_encoder.size_embedding.weight, a table"),
        (
            put("slot_encoder", "decoder.postional_encoding.weight", (0, 32)),
            "decoder.postional_encoding.weight has the shape (0, 32), which is empty",
        ),
        (
            put("slot_encoder", "decoder.mlp.2.bias", (24,), math.nan),
            "slot_encoder.decoder.mlp.2.bias holds numbers that are not finite",
        ),
        (
            put("slot_encoder", "encoder.norm.weight", (64,), math.inf),
            "slot_encoder.encoder.norm.weight holds numbers that are not finite",
        ),
        (
            put("program_encoder", "material_embedding.weight", (7, 32)),
            "program_encoder.material_embedding.weight has the shape (7, 32), but",
        ),
        (lambda state: state.pop("program_encoder"), "has no state dict 'program_encoder'; it has slot_encoder"),
        (without_backbone, "lacks slot_encoder.encoder.*, the weights of the frozen ViT"),
    ],
)
def test_what_does_not_fit(
    change, told: str, state: public.State, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changed = {module: dict(part) for module, part in state.items()}
    change(changed)
    torch.save(changed, tmp_path / "best_model.pt")
    names = ("--program2label", source / "program2label.json")
    line = refused(capsys, tmp_path / "best_model.pt", tmp_path / "run", *names)
    assert told in line
    assert f"{tmp_path / 'best_model.pt'}: " in line
    assert not (tmp_path / "run").exists()


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_the_file_is_not_run(state: public.State, source: Path, tmp_path: Path, capsys) -> None:
    torch.save({**state, "extra": Touch(tmp_path / "was-run")}, source / "evil.pt")
    line = refused(capsys, source / "evil.pt", tmp_path / "run")
    assert "evil.pt: holds posix.mkdir, and reading that would run code; save the two state dicts alone" in line
    assert not (tmp_path / "was-run").exists()


def test_files_that_are_none(source: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    best = source / "best_model.pt"
    for name, content in (("text.pt", b"hello"), ("cut.pt", best.read_bytes()[:-1000]), ("empty.pt", b"")):
        (source / name).write_bytes(content)
        line = refused(capsys, source / name, tmp_path / "run")
        assert "not a file that torch.save wrote" in line
    torch.save([1], source / "list.pt")
    line = refused(capsys, source / "list.pt", tmp_path / "run")
    assert "holds no dictionary of slot_encoder and program_encoder, but a list" in line
    assert "cannot be read (No such file" in refused(capsys, source / "none.pt", tmp_path / "run")
    assert "cannot be read (Is a directory" in refused(capsys, source, tmp_path / "run")
    lonely = shutil.copy(best, tmp_path / "best_model.pt")
    assert "program2label.json: cannot be read (No such file" in refused(capsys, lonely, tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not a JSON file"),
        ("[]", "has no names with ids under each of sizes, shapes, materials"),
        ('{"sizes": {"small": 0}, "shapes": {"cube": 0}}', "has no names with ids under each of"),
        ('{"sizes": {"small": 0, "large": 0}, "shapes": {"cube": 0}, "materials": {"m": 0}}', "its sizes do not have"),
        ('{"sizes": {"small": 0}, "shapes": {"cube": "0"}, "materials": {"m": 0}}', "its shapes do not have"),
        ('{"sizes": {"tiny": 0}, "shapes": {"cube": 0}, "materials": {"m": 0}}', "has no size 'large', which"),
    ],
)
def test_names_that_are_none(
    content: str, told: str, source: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "names.json").write_text(content)
    names = ("--program2label", tmp_path / "names.json", "--data_path", shards)
    line = refused(capsys, source / "best_model.pt", tmp_path / "run", *names)
    assert f"{tmp_path / 'names.json'}: " in line
    assert told in line


def test_a_name_too_many_for_the_table_is_borne_where_the_shards_lack_it(
    source: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The public build script leaves 61 material names for a table of 60 rows."""
    names = json.loads((source / "program2label.json").read_text())
    names["materials"]["one_more"] = 60
    (tmp_path / "names.json").write_text(json.dumps(names))
    given = (source / "best_model.pt", tmp_path / "run", "--program2label", tmp_path / "names.json")
    line = refused(capsys, *given)
    assert "material_embedding.weight has the shape (60, 32), but" in line
    assert "gives 'one_more' the id 60" in line
    assert nsi("import-reference", *given, "--data_path", shards, *FLAGS) == 0


def test_scenes_longer_than_the_model_takes(
    source: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best, run = source / "best_model.pt", tmp_path / "run"
    for given in ("0", "-1"):
        assert nsi("import-reference", best, run, "--max_program_len", given, *FLAGS) == 2
        assert capsys.readouterr().err.endswith(f"--max_program_len {given}: must be above 0\n")
    line = refused(capsys, best, run, "--data_path", shards, "--max_program_len", "2")
    assert "objects, more than --max_program_len 2; give the one that the model was trained with" in line
    assert not run.exists()


def test_nothing_is_overwritten(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    line = refused(capsys, source / "best_model.pt", tmp_path / "run")
    assert "run: is there already, and nothing is overwritten" in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


@pytest.mark.slow
def test_training_starts_from_it(source: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The whole reference recipe, one step from the imported weights, by the command that the import printed."""
    assert nsi("import-reference", source / "best_model.pt", tmp_path / "run", "--data_path", shards, *FLAGS) == 0
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert printed[:4] == ["nsi", "train", "--recipe", "reference"]
    printed[printed.index("NEW_RUN")] = str(tmp_path / "new")
    found = subprocess.run(
        [sys.executable, "-m", "launch", *printed[1:], "--batch_size", "12", "--max_steps", "1"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "trained otherwise" not in found.stderr
    before = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000000")
    after = read_checkpoint(tmp_path / "new" / "checkpoints" / "step-00000001")
    assert set(after.facts["best"]) == {"step", "R@5", "loss"}
    assert after.facts["backbone_hash"] == before.facts["backbone_hash"]
    then, now = (from_json(TrainConfig, each.facts["config"]) for each in (before, after))
    assert then.model == now.model
    moved = [
        float((after.training.parameters[name] - value).abs().max())
        for name, value in before.training.parameters.items()
    ]
    assert 0 < max(moved) < 1e-6  # Adam's first step in a warm-up of 10,000: 4e-8 each
