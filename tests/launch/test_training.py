"""Training end to end, in real processes: launchers agree, cut runs go on, bad input is told in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cluster.checkpoints.attempt import read_attempts, take_attempt
from cluster.checkpoints.checkpoint import COMPLETE, MODEL, newest_verified, read_checkpoint
from launch.runfolder import read_lines, standing_lines
from shards.manifest import read_manifest
from tests.gloo.worlds import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    *("--recipe", "demo", "--image_size", "32", "--batch_size", "12", "--num_slots", "4", "--num_iterations", "2"),
    *("--slot_dim", "16", "--mlp_hidden_size", "16", "--embed_dim", "8", "--d_model", "16"),
    *("--decoder_hidden_dim", "16", "--lr_warmup_steps", "2", "--log_every", "1", "--max_steps", "6"),
    *("--validate_every", "3", "--checkpoint_every", "2"),
]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def call(*command: str, env: dict[str, str] | None = None, timeout_s: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=env or environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def train(shards: Path, run: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`nsi train`, or launch/train.py under a launcher."""
    start = launcher or (sys.executable, "-m", "launch", "train")
    script = ("launch/train.py",) if launcher else ()
    return call(*start, *script, "--data_path", str(shards), "--log_path", str(run), *SMALL, *more)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in standing_lines(run, "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with no launcher, from its beginning to its end."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    found = train(shards, run)
    assert found.returncode == 0, found.stderr
    return run


def test_the_run_folder_is_as_promised(whole: Path) -> None:
    lines = read_lines(whole, "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"epoch", "loss", "contrastive", "reconstruction", "lr", "grad_norm", "images_per_second"} <= set(lines[0])
    assert (lines[0]["world_size"], lines[0]["zero_stage"], lines[0]["attempt"]) == (1, 1, 1)
    assert lines[3]["epoch"] == pytest.approx(1.0)  # 4 steps of 12 of 48 scenes
    for line in lines:
        assert line["loss"] == pytest.approx(line["contrastive"] + line["reconstruction"])
    assert [line["step"] for line in read_lines(whole, "validation.jsonl")] == [3, 6]
    for name in ("config.json", "checkpoints", "events", "tensorboard", "attempts"):
        assert (whole / name).exists()
    assert not list((whole / "prometheus").glob("*.json"))  # deregistered
    assert not (whole / "stopped").exists()
    newest = newest_verified(whole / "checkpoints", pytest.fail)
    assert newest is not None
    assert newest.name == "step-00000006"


def test_tensorboard_has_scalars_and_pictures(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "validation/R@5"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["validation/slots"]


LAUNCHERS = {
    "deepspeed": lambda: (
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port()),
    ),
    "torchrun": lambda: (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"),
    "accelerate": lambda: (
        str(BIN / "accelerate-launch"), "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "stage"), [("deepspeed", "2"), ("torchrun", "0"), ("accelerate", "3")])
def test_every_launcher_gives_the_same_losses(
    shards: Path, whole: Path, tmp_path: Path, launcher: str, stage: str
) -> None:
    found = train(shards, tmp_path / "run", "--zero_stage", stage, launcher=LAUNCHERS[launcher]())
    assert found.returncode == 0, found.stdout + found.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)
    lines = read_lines(tmp_path / "run", "metrics.jsonl")
    assert {line["world_size"] for line in lines} == {2}
    ours, theirs = (read_lines(run, "validation.jsonl") for run in (tmp_path / "run", whole))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gallery"] == 6


@pytest.mark.slow
def test_bare_slurm_variables(shards: Path, whole: Path, tmp_path: Path) -> None:
    """Three tasks as srun starts them, one of them with a row less; --micro_batch_size is no divisor of anything."""
    port = str(free_port())
    ranks = []
    for rank in range(3):
        step = {
            "SLURM_JOB_ID": "17",
            "SLURM_STEP_NUM_TASKS": "3",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_TASKS_PER_NODE": "3",
            "SLURM_STEP_NODELIST": "localhost",
            "MASTER_PORT": port,
        }
        command = ["launch/train.py", "--data_path", str(shards), "--log_path", str(tmp_path / "run"), *SMALL]
        command += ["--micro_batch_size", "3"]
        ranks.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(**step)))
    try:
        assert [rank.wait(240) for rank in ranks] == [0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)
    assert json.loads((tmp_path / "run" / "attempts" / "attempt-0001.json").read_text())["launcher"] == "srun"


@pytest.mark.parametrize("how", ["torn", "killed"])
def test_a_cut_run_goes_on_bit_for_bit(shards: Path, whole: Path, tmp_path: Path, how: str) -> None:
    """Stopped dead at some step, and once with its newest checkpoint torn."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", "--data_path", str(shards), "--log_path", str(run), *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, env=environment())
    try:
        wait_for(lambda: (run / "checkpoints" / "step-00000004" / COMPLETE).exists(), process)
    finally:
        process.kill()
        process.wait()
    if how == "torn":
        newest = newest_verified(run / "checkpoints", print)
        assert newest is not None
        model = newest / MODEL
        model.write_bytes(model.read_bytes()[:-1])
    found = train(shards, run)
    assert found.returncode == 0, found.stderr
    assert ("passed over a checkpoint" in found.stderr) == (how == "torn")
    assert losses(run) == losses(whole)
    assert len(list((run / "attempts").glob("*.json"))) == 2
    one, other = (read_checkpoint(path / "checkpoints" / "step-00000006") for path in (run, whole))
    for name, tensor in one.training.parameters.items():
        assert torch.equal(tensor, other.training.parameters[name])


def wait_for(done, process: subprocess.Popen, timeout_s: float = 120) -> None:
    limit = time.monotonic() + timeout_s
    while not done():
        assert process.poll() is None or done(), "the run ended before its time"
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_leaves_with_0(shards: Path, whole: Path, tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", "--data_path", str(shards), "--log_path", str(run), *SMALL]
    long = ["--max_steps", "100000", "--schedule", "constant", "--validate_every", "100000"]
    process = subprocess.Popen([*command, *long], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(read_lines(run, "metrics.jsonl")) >= 3, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"stopped by {signal.Signals(number).name}, saved" in output
    last = read_lines(run, "metrics.jsonl")[-1]["step"]
    newest = newest_verified(run / "checkpoints", pytest.fail)
    assert newest is not None
    assert int(newest.name[5:]) == last
    assert (run / "stopped").read_text() == f"{last}\n"


def test_a_stop_file_and_a_time_limit_end_it_saved(shards: Path, tmp_path: Path) -> None:
    """By the limit it is to be queued again, as the mark says; by the file it is not."""
    run = tmp_path / "run"
    long = ["--max_steps", "100000", "--schedule", "constant", "--validate_every", "100000"]
    found = train(shards, run, *long, "--time_limit", "0.1", "--grace_seconds", "5.99")
    assert found.returncode == 0, found.stderr
    assert "stopped by its time limit, saved" in found.stdout
    assert (run / "stopped").exists()
    command = [sys.executable, "-m", "launch", "train", "--data_path", str(shards), "--log_path", str(run), *SMALL]
    before = len(read_lines(run, "metrics.jsonl"))
    process = subprocess.Popen([*command, *long], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(read_lines(run, "metrics.jsonl")) >= before + 3, process)
        (run / "stop").touch()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"stopped by {run / 'stop'}, saved" in output
    assert not (run / "stopped").exists()
    assert not (run / "stop").exists()
    newest = newest_verified(run / "checkpoints", pytest.fail)
    assert newest is not None
    assert int(newest.name[5:]) == read_lines(run, "metrics.jsonl")[-1]["step"]


@pytest.mark.parametrize("of_this_job", [True, False])
def test_a_wish_to_stop_that_came_before_the_start(shards: Path, tmp_path: Path, of_this_job: bool) -> None:
    """While a job's launcher starts, or while the job waits in the queue again, it counts; else it is of long ago."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    touched = time.time() - 60
    os.utime(run / "stop", (touched, touched))
    variables = {"NSI_JOB_BEGAN": str(int(touched) - 60)} if of_this_job else {}
    command = [sys.executable, "-m", "launch", "train", "--data_path", str(shards), "--log_path", str(run), *SMALL]
    found = call(*command, "--max_steps", "3", env=environment(**variables))
    assert found.returncode == 0, found.stderr
    assert ("stopped by" in found.stdout) == of_this_job
    assert not (run / "stop").exists()


def test_what_was_saved_while_a_start_prepared_is_gone_on_from(shards: Path, tmp_path: Path) -> None:
    """The checkpoint of step 4 comes back into its folder once a start has chosen that of step 2 and prepared."""
    run, steps = tmp_path / "run", ["--schedule", "constant", "--checkpoint_every", "2", "--validate_every", "100"]
    assert train(shards, run, *steps, "--max_steps", "4").returncode == 0
    late, place = tmp_path / "late", run / "checkpoints" / "step-00000004"
    place.rename(late)
    patch = f"""
import os
from launch.cli import main
from launch.training import run

prepare = run.prepare
def slow(*arguments):
    parts = prepare(*arguments)
    print("prepared from", parts.restored.step)
    if os.path.exists("{late}"):
        os.rename("{late}", "{place}")
    return parts
run.prepare = slow
main()
"""
    flags = ["--data_path", str(shards), "--log_path", str(run), *SMALL, *steps, "--max_steps", "6"]
    found = call(sys.executable, "-c", patch, "train", *flags)
    assert found.returncode == 0, found.stderr
    assert [line for line in found.stdout.splitlines() if "prepared" in line] == ["prepared from 2", "prepared from 4"]
    assert [each.restored_step for each in read_attempts(run / "attempts")] == [0, 4]
    assert train(shards, tmp_path / "whole", *steps, "--max_steps", "6").returncode == 0
    assert losses(run) == losses(tmp_path / "whole")


def test_a_broken_step_reaches_no_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--lr", "1e30", "--lr_warmup_steps", "0", "--log_every", "5", "--checkpoint_every", "1"]
    said = one_line(train(shards, run, *more, "--nonfinite_limit", "2"))
    assert "step 4: the loss or its gradient is not a finite number, 3 steps in a row" in said
    assert str(run / "nonfinite-00000004.json") in said
    last = read_lines(run, "metrics.jsonl")[-1]
    assert last["loss"] is None or last["grad_norm"] is None
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000001"]
    found = json.loads((run / "nonfinite-00000004.json").read_text())
    order = read_manifest(shards).samples("train")
    assert {scene["id"] for scene in found["samples"]} <= set(range(order))
    assert len(found["samples"]) == 12
    assert max(float(each["norm"]) for each in found["parameters"]) > 1e25  # the step that went wrong was the first
    events = [json.loads(line) for path in (run / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sum(event["facts"]["nonfinite_steps"] for event in events if event["kind"] == "steps") == 3


def test_a_batch_of_one(shards: Path, tmp_path: Path) -> None:
    """No negatives: the contrastive loss is 0 and has no gradient, and the reconstruction goes on."""
    found = train(shards, tmp_path / "run", "--batch_size", "1", "--max_steps", "3", "--validate_every", "100")
    assert found.returncode == 0, found.stderr
    lines = read_lines(tmp_path / "run", "metrics.jsonl")
    assert [line["contrastive"] for line in lines] == [0.0] * 3
    assert all(line["reconstruction"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_two_at_once_do_not_harm_each_other(shards: Path, tmp_path: Path) -> None:
    """The older of two starts of one run ends at its next checkpoint and says why."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", "--data_path", str(shards), "--log_path", str(run), *SMALL]
    older = subprocess.Popen(
        [*command, "--max_steps", "100000", "--schedule", "constant", "--validate_every", "100000"],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: len(read_lines(run, "metrics.jsonl")) >= 3, older)
        take_attempt(run / "attempts", 1, "none", 2)
        _, said = older.communicate(timeout=60)
    finally:
        older.kill()
    assert older.returncode == 1
    assert "a newer attempt trains this run" in said


def test_weights_of_another_run_start_a_fresh_one(shards: Path, whole: Path, tmp_path: Path) -> None:
    start = whole / "checkpoints" / "step-00000006"
    found = train(shards, tmp_path / "run", "--checkpoint_path", str(start), "--max_steps", "1", "--lr", "1e-9")
    assert found.returncode == 0, found.stderr
    one, other = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001"), read_checkpoint(start)
    for name, tensor in one.training.parameters.items():
        torch.testing.assert_close(tensor, other.training.parameters[name], atol=1e-6, rtol=0)
    assert losses(tmp_path / "run")[0] < losses(whole)[0]


def test_evaluation_and_report(whole: Path) -> None:
    assert call(sys.executable, "-m", "launch", "eval", str(whole), "--split", "test").returncode == 0
    found = json.loads((whole / "eval-test.json").read_text())
    assert found["retrieval"]["gallery"] == 6
    assert found["retrieval"]["chance"]["R@5"] == pytest.approx(5 / 6)
    assert {"R@1", "R@5", "R@10", "median_rank"} <= set(found["retrieval"]["schema_to_image"])
    assert {"FG-ARI", "mBO", "mIoU"} <= set(found["discovery"])
    assert call(sys.executable, "-m", "launch", "report", str(whole)).returncode == 0
    assert (whole / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_evaluation_agrees_with_validation(shards: Path, whole: Path) -> None:
    """Two roads to one figure: the trainer's validation, and eval on the validation split from the checkpoint."""
    assert (
        call(sys.executable, "-m", "launch", "eval", str(whole), "--split", "val", "--checkpoint", "6").returncode == 0
    )
    found = json.loads((whole / "eval-val.json").read_text())["retrieval"]
    last = read_lines(whole, "validation.jsonl")[-1]
    assert found["schema_to_image"]["R@5"] == pytest.approx(last["schema_to_image_R@5"])
    assert found["image_to_schema"]["R@5"] == pytest.approx(last["image_to_schema_R@5"])


def one_line(found: subprocess.CompletedProcess) -> str:
    """The failure's only line: no traceback, status 1."""
    lines = [line for line in found.stderr.splitlines() if line.startswith("nsi ")]
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    assert len(lines) == 1, found.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--batch_size", "49"], "--batch_size 49 is larger than the train split's 48 scenes"),
        (["--max_program_len", "2"], "more than --max_program_len 2; raise it"),
        (["--backbone", "no_such_vit"], "--backbone no_such_vit: timm"),
        (["--image_size", "33"], "patches of 8"),
        (["--deepspeed_config", "/nowhere.json"], "/nowhere.json: cannot be read"),
    ],
)
def test_bad_input_leaves_nothing_behind(shards: Path, tmp_path: Path, more: list[str], line: str) -> None:
    assert line in one_line(train(shards, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_world_that_no_launcher_explains(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "train", "--data_path", str(shards), "--log_path", str(tmp_path / "r")]
    assert "MASTER_ADDR, MASTER_PORT not" in one_line(
        call(*command, *SMALL, env=environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"))
    )


def test_changed_science_is_refused(shards: Path, whole: Path) -> None:
    said = one_line(train(shards, whole, "--num_slots", "5", "--seed", "9"))
    assert "--num_slots was 4, is 5; --seed was 0, is 9: a run keeps these" in said


def test_a_checkpoint_of_another_schema(whole: Path, scenes: Path, tmp_path: Path) -> None:
    """The same scenes with one material missing: ids mean other things."""
    from tests.making import make_shards

    copy = shutil.copytree(scenes, tmp_path / "scenes")
    paths = sorted(copy.rglob("CLEVRTEX*.json"))
    victim = json.loads(paths[0].read_text())["objects"][0]["material"]
    for path in paths:
        if f'"{victim}"' in path.read_text():
            shutil.rmtree(path.parent)
    make_shards(copy, tmp_path / "shards")
    start = str(whole / "checkpoints" / "step-00000006")
    assert "was trained on another schema" in one_line(
        train(tmp_path / "shards", tmp_path / "run", "--checkpoint_path", start)
    )


def test_a_taken_port(shards: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--prometheus_port {port}: port {port} cannot be used" in one_line(
            train(shards, tmp_path / "run", "--prometheus_port", port)
        )
    assert not (tmp_path / "run").exists()


def test_trained_vit_from_a_local_file(shards: Path, tmp_path: Path) -> None:
    """The real loading code on a small model that the test saves: any timm ViT, its weights from a file."""
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    flags = ["--backbone", "vit_tiny_patch16_224", "--backbone_weights", str(tmp_path / "vit.pt"), "--max_steps", "2"]
    found = train(shards, tmp_path / "run", *flags)
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["backbone"]["grid"] == [2, 2]
    evaluated = call(sys.executable, "-m", "launch", "eval", str(tmp_path / "run"))
    assert evaluated.returncode == 0, evaluated.stderr
    vit.norm.weight.data.mul_(2)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    assert "other weights" in one_line(train(shards, tmp_path / "run", *flags, "--max_steps", "3"))


@pytest.mark.slow
def test_the_sample_in_its_original_layout(tmp_path: Path) -> None:
    """Real-format scenes, where they are at hand."""
    sample = ROOT.parent / "shared" / "clevrtex-sample"
    if not sample.is_dir():
        pytest.skip("the CLEVRTex sample is not beside this checkout")
    for command in (["shard", str(sample), str(tmp_path / "shards")], ["verify", str(tmp_path / "shards")]):
        found = call(sys.executable, "-m", "launch", *command)
        assert found.returncode == 0, found.stderr
    found = train(tmp_path / "shards", tmp_path / "run")
    assert found.returncode == 0, found.stderr
    found = call(sys.executable, "-m", "launch", "eval", str(tmp_path / "run"))
    assert found.returncode == 0, found.stderr
    assert "32 scenes, all of them the gallery" in found.stdout


def break_scenes(shards: Path, tmp_path: Path, count: int) -> tuple[Path, list[str]]:
    """A copy of the shards in which a byte of so many training images is flipped, and the keys of these."""
    from shards.reading.dataset import open_split

    copy = Path(shutil.copytree(shards, tmp_path / "broken"))
    broken = open_split(copy, "train").locate(range(3, 3 + 7 * count, 7))
    for sample in broken:
        tar = copy / sample.span.shard
        data = bytearray(tar.read_bytes())
        data[sample.image.offset + 30] ^= 1
        tar.write_bytes(data)
    return copy, [sample.key for sample in broken]


def test_a_damaged_scene_stops_the_run(shards: Path, tmp_path: Path) -> None:
    copy, (key,) = break_scenes(shards, tmp_path, 1)
    said = one_line(train(copy, tmp_path / "run"))
    assert f"train-000000.tar: image of {key} at offset" in said
    assert "does not have its checksum" in said


@pytest.mark.slow
def test_damaged_scenes_are_skipped_and_accounted_for(shards: Path, tmp_path: Path) -> None:
    copy, keys = break_scenes(shards, tmp_path, 3)
    run = tmp_path / "run"
    found = train(copy, run, "--on_bad_sample", "skip", "--max_steps", "12")  # three epochs of 48
    assert found.returncode == 0, found.stderr
    entries = [json.loads(line) for line in (run / "ledger" / "attempt-0001.jsonl").read_text().splitlines()]
    assert sorted(each["key"] for entry in entries for each in entry["skipped"]) == sorted(keys * 3)
    events = [json.loads(line) for line in (run / "events" / "attempt-0001-rank-00000.jsonl").read_text().splitlines()]
    assert sum(event["facts"]["count"] for event in events if event["kind"] == "bad_samples") == 9
    audited = call(sys.executable, "-m", "launch", "audit", str(run), "--data_path", str(shards))
    assert audited.returncode == 0, audited.stderr
    assert "9 skipped" in audited.stdout
    limited = train(copy, tmp_path / "other", "--on_bad_sample", "skip", "--max_steps", "12", "--bad_sample_limit", "2")
    assert "damaged scenes, more than --bad_sample_limit 2; the last: " in one_line(limited)


@pytest.mark.slow
def test_data_without_masks(shards: Path, tmp_path: Path) -> None:
    """The public NSI code's files have none: training and retrieval need none, and the rest says so."""
    for command in (["shard", "--to-hdf5", str(shards), str(tmp_path / "h5")],
                    ["shard", str(tmp_path / "h5"), str(tmp_path / "shards")]):  # fmt: skip
        found = call(sys.executable, "-m", "launch", *command)
        assert found.returncode == 0, found.stderr
    run = tmp_path / "run"
    found = train(tmp_path / "shards", run)
    assert found.returncode == 0, found.stderr
    for verb in ("eval", "report", "audit"):
        found = call(sys.executable, "-m", "launch", verb, str(run))
        assert found.returncode == 0, found.stderr
        assert verb != "eval" or "this data has no masks" in found.stdout
    content = json.loads((run / "eval-test.json").read_text())
    assert (content["retrieval"]["gallery"], content["discovery"], content["grounding"]) == (6, None, None)
