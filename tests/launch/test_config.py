"""The command line: the public flags and their defaults, recipes, exit statuses. Frozen, since scripts hang on it."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.config import TrainConfig, check, flag_values, from_json, science, to_json
from launch.recipes import starting_point
from launch.train import parse
from launch.training.resume import is_better
from launch.training.schedule import Plateau, after_validation, learning_rate
from nsi.errors import UserError

PUBLIC = {
    "num_workers": 1,
    "seed": 0,
    "batch_size": 128,
    "epochs": 300,
    "patience": 4,
    "image_size": 224,
    "lr": 4e-4,
    "lr_warmup_steps": 10000,
    "grad_clip": 1.0,
    "max_program_len": 10,
    "num_blocks": 8,
    "d_model": 192,
    "hidden_dim": 192,
    "num_heads": 8,
    "dropout": 0.1,
    "num_iterations": 5,
    "num_slots": 15,
    "num_slot_heads": 1,
    "slot_dim": 192,
    "embed_dim": 64,
    "mlp_hidden_size": 192,
    "beta": 1.0,
    "tau": 0.1,
}
OURS = {
    "data_path", "log_path", "checkpoint_path", "recipe", "max_steps", "precision", "zero_stage", "micro_batch_size",
    "checkpoint_every", "log_every", "validate_every", "backbone", "backbone_weights", "patch_size", "reconstruction",
    "backbone_trainable", "backbone_lr",
    "score", "schedule", "weight_decay", "deepspeed_config", "prometheus_port", "schema_dropout", "decoder_hidden_dim",
    "decoder_depth", "attend_padding", "position_std", "position_dims", "on_bad_sample", "bad_sample_limit",
    "cache_path", "cache_gb", "features",
    "time_limit", "grace_seconds", "keep_last", "keep_every_hours", "hang_seconds", "straggler_factor",
    "learned_tau", "slot_start", "bilevel", "activation", "nonfinite_limit", "recompute", "compile",
    "squash_size", "normalization", "clip_scope", "plateau_in_warmup", "select_by", "padding_labels",
}  # fmt: skip
PATHS = ["--data_path", "D", "--log_path", "L"]


def test_public_flags_keep_their_names_and_defaults() -> None:
    values = flag_values(parse(PATHS))
    assert {name: values[name] for name in PUBLIC} == PUBLIC
    assert values["checkpoint_path"] is None


def test_no_flag_comes_or_goes_unnoticed() -> None:
    assert set(flag_values(parse(PATHS))) == set(PUBLIC) | OURS


def test_the_public_example_command_parses() -> None:
    given = ["--epochs", "900", "--batch_size", "128", "--num_blocks", "8", "--num_heads", "8", "--num_iterations", "3"]
    config = parse([*PATHS, *given])
    assert (config.optim.epochs, config.model.num_iterations) == (900, 3)


def test_recipe_beats_default_and_flag_beats_recipe() -> None:
    plain, demo = parse(PATHS), parse([*PATHS, "--recipe", "demo"])
    assert plain.backbone.backbone == "vit_base_patch8_224.dino"
    assert demo.backbone.backbone == "dct"
    both = parse([*PATHS, "--recipe=demo", "--num_slots", "5", "--lr", "0.5"])
    assert (both.model.num_slots, both.optim.lr) == (5, 0.5)
    assert both.backbone.backbone == "dct"
    assert both.recipe == "demo"


REFERENCE = {
    "attend_padding": True,
    "normalization": "none",
    "squash_size": 128,
    "reconstruction": "sum",
    "clip_scope": "slot_encoder",
    "schedule": "plateau",
    "plateau_in_warmup": True,
    "select_by": "loss",
    "position_std": 1.0,
}


def test_the_reference_recipe_is_the_public_defaults_and_a_flag_for_each_difference() -> None:
    plain, reference = (flag_values(parse([*PATHS, "--recipe", name])) for name in ("default", "reference"))
    assert {name: value for name, value in reference.items() if value != plain[name]} == {
        **REFERENCE,
        "recipe": "reference",
    }
    assert {name: reference[name] for name in PUBLIC} == PUBLIC
    assert reference["schema_dropout"] == reference["weight_decay"] == 0.0
    config = parse([*PATHS, "--recipe", "reference"])
    assert set(REFERENCE) <= set(science(config))  # a run may not change them on its way
    help_text = " ".join(status("train", "--help", "--recipe", "reference")[1].replace("│", " ").split())
    for name, value in REFERENCE.items():
        assert f"--{name} {value} (default {plain[name]})" in help_text
    assert "in --recipe reference their sum" in help_text  # of beta, whose value means another thing there


def test_readme_shows_the_reference_recipe() -> None:
    page = (Path(cli.__file__).parent / "README.md").read_text()
    plain = flag_values(parse(PATHS))
    for name, value in REFERENCE.items():
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`--{name}" in line)
        cells = [cell.strip().split(" ")[0] for cell in row.split("|")[2:4]]
        assert cells == [str(value), str(plain[name])], row


def test_unknown_recipe() -> None:
    with pytest.raises(UserError, match="--recipe cake: unknown; there are default, reference, demo"):
        starting_point(["--recipe", "cake"])


def test_deepspeeds_own_flag_is_passed_over() -> None:
    assert parse(["--local_rank=1", *PATHS]) == parse(PATHS)


def test_configuration_survives_json() -> None:
    config = parse(
        [*PATHS, "--recipe", "demo", "--backbone_weights", "w.pt", "--zero_stage", "2", "--precision", "bf16"]
    )
    again = from_json(TrainConfig, json.loads(json.dumps(to_json(config))))
    assert again == config
    assert isinstance(again.log_path, Path)
    assert isinstance(again.backbone.backbone_weights, Path)


def test_configuration_of_another_version() -> None:
    content = to_json(parse(PATHS))
    content["optim"]["magic"] = 1
    with pytest.raises(UserError, match="knows no 'magic'"):
        from_json(TrainConfig, content)


@pytest.mark.parametrize(
    "given",
    ["--batch_size 0", "--lr 0", "--lr -1", "--tau 0", "--micro_batch_size -1", "--log_every 0", "--beta -1",
     "--epochs 0", "--prometheus_port 70000", "--checkpoint_every 0", "--num_workers 0", "--lr nan",
     "--bad_sample_limit -1", "--squash_size -1", "--cache_gb 0", "--lr inf", "--weight_decay inf",
     "--weight_decay nan", "--tau nan", "--tau inf", "--beta inf", "--beta nan", "--grad_clip inf",
     "--cache_gb inf", "--position_std inf"],
)  # fmt: skip
def test_impossible_values(given: str) -> None:
    with pytest.raises(UserError, match=given.split()[0]):
        check(parse([*PATHS, *given.split()]))


def test_what_a_run_may_not_change() -> None:
    assert science(parse(PATHS)) == science(
        parse([*PATHS, "--zero_stage", "3", "--precision", "bf16", "--num_workers", "4"])
    )
    for given in ("--batch_size 64", "--num_slots 7", "--tau 0.2", "--seed 1", "--lr 1e-3", "--image_size 112"):
        assert science(parse(PATHS)) != science(parse([*PATHS, *given.split()]))


def status(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(list(arguments))
    return code, out.getvalue(), err.getvalue()


def test_exit_statuses(tmp_path: Path) -> None:
    assert status("--help")[0] == 0
    assert status()[0] == 0
    assert status("fly")[0] == 2
    assert status("verify")[0] == 2
    assert status("verify", "--loud", str(tmp_path))[0] == 2
    code, out, err = status("verify", str(tmp_path))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1  # one line that a tired person understands
    assert "manifest.json: missing" in err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        cli.run(["verify", str(tmp_path), "--debug"])


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_teaches(verb: str) -> None:
    code, out, _ = status(verb, "--help")
    assert code == 0
    assert f"nsi {verb}" in out


def test_help_tells_what_the_recipe_sets() -> None:
    _, out, _ = status("train", "--help", "--recipe", "demo")
    assert "--backbone dct (default" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("module", ["launch.synth", "launch.shard", "launch.verify"])
def test_light_verbs_do_not_wait_for_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_warm_up_then_cosine() -> None:
    optim = parse([*PATHS, "--lr", "1.0", "--lr_warmup_steps", "10"]).optim
    rates = [learning_rate(optim, step, 110, Plateau()) for step in range(111)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))


def test_plateau_halves_after_patience_and_not_in_the_warm_up() -> None:
    optim = parse([*PATHS, "--schedule", "plateau", "--patience", "2", "--lr", "1.0", "--lr_warmup_steps", "10"]).optim
    plateau = after_validation(Plateau(), optim, 1, 5.0)
    for step in (2, 4, 6):
        plateau = after_validation(plateau, optim, step, 6.0)
    assert plateau == Plateau(1.0, 5.0, 0)
    for step, loss in ((20, 6.0), (30, 4.0), (40, 4.5), (50, 4.5)):
        plateau = after_validation(plateau, optim, step, loss)
    assert plateau == Plateau(0.5, 4.0, 0)
    assert learning_rate(optim, 60, 1000, plateau) == 0.5


def test_plateau_counts_in_the_warm_up_on_request() -> None:
    given = ["--schedule", "plateau", "--patience", "2", "--lr", "1.0", "--lr_warmup_steps", "10"]
    optim = parse([*PATHS, *given, "--plateau_in_warmup"]).optim
    plateau = Plateau()
    for step, loss in ((1, 5.0), (2, 6.0), (3, 5.0)):
        plateau = after_validation(plateau, optim, step, loss)
    assert plateau == Plateau(0.5, 5.0, 0)
    assert learning_rate(optim, 4, 1000, plateau) == pytest.approx(0.25)
    assert learning_rate(optim, 10, 1000, plateau) == 0.5
    cosine = parse([*PATHS, "--patience", "2", "--lr_warmup_steps", "10", "--plateau_in_warmup"]).optim
    for step in range(1, 9):
        assert after_validation(Plateau(1.0, 1.0), cosine, step, 2.0) == Plateau(1.0, 1.0)


def test_what_the_best_validation_is() -> None:
    figures, best = {"R@5": 0.5, "loss": 3.0}, {"step": 4, "R@5": 0.4, "loss": 2.0}
    assert is_better(figures, best, "retrieval")
    assert not is_better(figures, best, "loss")
    assert is_better({"R@5": 0.1, "loss": 1.0}, best, "loss")
    assert not is_better(best, best, "loss")
    assert not is_better(best, best, "retrieval")
    assert is_better(figures, {}, "loss")
    assert is_better(figures, {"step": 4, "R@5": 0.4}, "retrieval")  # as checkpoints had it
