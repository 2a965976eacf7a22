"""Steps whose loss or gradient is no finite number: left out for a while, then the run stops and says what it saw.

The weights stay as they were in such a step. In fp16 a gradient that overflows is no such step but the loss scale's
daily business, as long as the loss itself is finite.

Shapes: R rows of this rank, P patches, F features, N slots, T objects, E embedding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from cluster.collectives import collect, share
from cluster.engine.engine import Engine
from launch.training.step import Features, StepResult, StepSettings, features_of, forward, micro_batches
from nsi.batch import Batch

LARGEST = 20  # parameters in a report


def is_broken(result: StepResult, precision: str) -> bool:
    """Whether a step was left out for want of finite numbers; fp16's overflows, with a finite loss, are let pass."""
    return not result.loss_is_finite() or (not result.applied and precision != "fp16")


def report(
    engine: Engine, backbone: Features, batch: Batch, step: int, settings: StepSettings, result: StepResult
) -> dict[str, Any]:
    """What a broken step looks like from near: every scene's largest values and the largest parameters, not finite
    ones first. All ranks take part, and all get the same; the model runs over the step's batch once more.
    """
    with torch.no_grad():
        own = [
            scene
            for micro in micro_batches(batch, settings)
            for scene in _scenes(engine, features_of(micro, backbone), micro, step, settings)
        ]
    state = engine.state()
    parameters = [
        {"name": name, "norm": tensor.norm().item(), "largest": tensor.abs().max().item()}
        for name, tensor in (state.parameters if state else {}).items()
    ]
    return {
        "step": step + 1,
        "contrastive": float(result.contrastive),
        "reconstruction": float(result.reconstruction),
        "grad_norm": result.grad_norm,
        "samples": sorted((scene for part in collect(own) for scene in part), key=_worst_first),
        "parameters": sorted(share(parameters), key=lambda each: _rank(each["norm"]))[:LARGEST],
    }


def suspects(found: dict[str, Any]) -> str:
    """In a few words, where the numbers stopped being finite."""
    broken = [scene for scene in found["samples"] if not all(map(math.isfinite, scene["largest"].values()))]
    weights = [each["name"] for each in found["parameters"] if not math.isfinite(each["norm"])]
    if weights:
        return f"weights are not finite: {', '.join(weights[:3])}"
    if not broken:
        return "every scene's own values are finite, so it is in the scores or the gradient"
    names = ", ".join(f"{scene['id']} ({scene['key']})" for scene in broken[:3]) + (", ..." if broken[3:] else "")
    first = next(name for name, value in broken[0]["largest"].items() if not math.isfinite(value))
    return f"in {len(broken)} of {len(found['samples'])} scenes, beginning with their {first}: {names}"


def advice(found: dict[str, Any]) -> str:
    """What to do about it."""
    features = [scene["largest"].get("features", 0.0) for scene in found["samples"]]  # none where they are trained too
    if all(map(math.isfinite, features)):
        return "start a fresh --log_path with a lower --lr or more --lr_warmup_steps"
    return "the model is not at fault: check --backbone_weights, or write the feature store again"


def write_report(path: Path, found: dict[str, Any]) -> None:
    """The report as JSON; numbers that are not finite stand as text."""
    path.write_text(json.dumps(_speakable(found), indent=1) + "\n")


def _scenes(
    engine: Engine, features_RPF: torch.Tensor, batch: Batch, step: int, settings: StepSettings
) -> list[dict[str, Any]]:
    """The largest absolute values of each of this rank's scenes, in the order in which they are computed."""
    output = forward(engine, features_RPF, batch, step, settings)
    largest = {"features": features_RPF} if features_RPF.is_floating_point() else {}  # else images
    largest |= {
        "slots": output.slots_BND,
        "slot_embeddings": output.slot_embeddings_BNE,
        "primitive_embeddings": output.primitive_embeddings_BTE.masked_fill(~batch.objects_BT[..., None], 0),
        "squared_error": output.squared_error_B[:, None],
    }
    columns = {name: values.float().flatten(1).abs().amax(dim=1).tolist() for name, values in largest.items()}
    return [
        {"id": sample, "key": batch.keys[row], "largest": {name: column[row] for name, column in columns.items()}}
        for row, sample in enumerate(batch.sample_ids_B.tolist())
        if batch.keys[row]
    ]


def _worst_first(scene: dict[str, Any]) -> tuple[bool, float]:
    return min(_rank(value) for value in scene["largest"].values())


def _rank(value: float) -> tuple[bool, float]:
    return math.isfinite(value), -abs(value) if math.isfinite(value) else 0.0


def _speakable(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _speakable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_speakable(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
