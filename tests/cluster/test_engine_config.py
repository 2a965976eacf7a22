"""What a DeepSpeed JSON may say: unknown keys, what belongs to flags, and values that were seen to do harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.engine.config import KNOWN_KEYS, EngineConfig, precision_note, read_deepspeed_config
from cluster.engine.engine import check_deepspeed_config
from nsi.errors import UserError

OURS = Path(__file__).parents[2] / "launch" / "deepspeed.json"


def write(folder: Path, content: object) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"zero_optimisation": {}}, "DeepSpeed knows no zero_optimisation; did you mean zero_optimization?"),
        ({"xyz": 1}, "DeepSpeed knows no xyz; remove it"),
        ({"train_batch_size": 8}, "sets train_batch_size, which belongs to --batch_size"),
        ({"bfloat16": {"enabled": True}}, "sets bfloat16, which belongs to --precision"),
        ({"amp": {"enabled": True}}, "sets amp, which belongs to --precision"),
        ({"zero_optimization": {"stage": 2}}, "sets zero_optimization.stage, which belongs to --zero_stage"),
        ({"data_types": {"param_dtype": "bf16"}}, "sets data_types.param_dtype, which belongs to --precision"),
        ({"pipeline": {"stages": 2}}, "sets pipeline, but every rank trains the whole model"),
        ({"sparse_gradients": True}, "sets sparse_gradients, but DeepSpeed has dropped it"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op can be "mean" alone'),
        ({"communication_data_type": "bf16"}, 'communication_data_type can be "fp32" alone'),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients can be false alone"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            "sets zero_optimization.offload_param.nvme_path, but checkpoints do not find what lies on NVMe",
        ),
        ({"zero_optimization": True}, "zero_optimization must be an object"),
        ("[]", "holds no JSON object"),
        ("{", "not a JSON file"),
        ('{"dump_state": true, "dump_state": false}', "not a JSON file (dump_state is there twice)"),
        # what only DeepSpeed knows
        (
            {"zero_optimization": {"overlap_coms": True}},
            "DeepSpeed knows no zero_optimization.overlap_coms; did you mean zero_optimization.overlap_comm?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "no zero_optimization.offload_optimizer.devise; did you mean zero_optimization.offload_optimizer.device?",
        ),
        ({"timers": {"throughput": {"enabeld": True}}}, "did you mean timers.throughput.enabled?"),
        ({"flops_profiler": {"profile_stp": 2}}, "did you mean flops_profiler.profile_step?"),
        ({"tensorboard": {"path": "x"}}, "DeepSpeed knows no tensorboard.path; did you mean tensorboard.output_path?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean data_types.grad_accum_dtype?"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "does not take it (reduce_bucket_size: Input should be"),
        ({"flops_profiler": True}, "does not take it"),
    ],
)  # fmt: skip
def test_one_clear_line(tmp_path: Path, content: object, line: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        check_deepspeed_config(path, EngineConfig())
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert line in said
    assert "\n" not in said


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_taken(tmp_path: Path, stage, precision) -> None:
    for path in (
        OURS,
        write(tmp_path, {}),
        write(
            tmp_path,
            {
                "zero_optimization": {"stage3_prefetch_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}},
                "prescale_gradients": False,
                "communication_data_type": "fp32",
                "wall_clock_breakdown": True,
                "comms_logger": {"enabled": False},
            },
        ),
    ):
        check_deepspeed_config(path, EngineConfig(zero_stage=stage, precision=precision))


def test_a_setting_of_another_stage(tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}})
    with pytest.raises(UserError, match="only supported for ZeRO Stage 3"):
        check_deepspeed_config(path, EngineConfig(zero_stage=1))


def test_the_list_of_keys_is_deepspeeds() -> None:
    """DeepSpeed looks for exactly these keys in its configuration: a new version's show up here."""
    watch = """
import json, sys
from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig

asked = set()

class Watched(dict):
    def get(self, key, default=None):
        asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

comm.get_rank = comm.get_world_size = lambda *_: 1  # else it does not come to look for one of the keys
DeepSpeedConfig(Watched(train_batch_size=1))
print("FOUND", json.dumps(sorted(asked)))
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", watch], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    (line,) = (line for line in found.stdout.splitlines() if line.startswith("FOUND "))
    assert set(json.loads(line[6:])) == KNOWN_KEYS


def test_our_own_file_says_nothing_of_flags() -> None:
    assert read_deepspeed_config(OURS)["zero_optimization"]["overlap_comm"] is False


def test_how_a_precision_comes_about() -> None:
    assert precision_note(EngineConfig(zero_stage=0, precision="bf16")) == (
        "precision bf16 at ZeRO stage 0: through torch.autocast, weights and Adam in float32"
    )
    assert precision_note(EngineConfig(zero_stage=1, precision="bf16")) is None
    assert precision_note(EngineConfig(zero_stage=0, precision="fp32")) is None
