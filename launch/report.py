"""`nsi report RUN`: a run's figures, pictures and curves as one HTML file that needs nothing beside it.

This file gathers what the page shows; its words and looks are in report.html.j2, its pictures in figures.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import tyro

from cluster.checkpoints.attempt import Attempt, read_attempts
from launch import runfolder
from launch.reporting.history import UNKNOWN, attempt_rows, time_rows, when
from launch.runfolder import standing_lines
from nsi.errors import UserError
from nsi.metrics.grounding import IOU_THRESHOLD

FIRST_SPLIT = "test"
TEMPLATE = "report.html.j2"
LABEL_WIDTH = 400  # a frame of so many pixels has slot numbers at their natural size
WIDE_SHARE = 0.4  # a slot over so much of the frame is drawn faintly, or its colour would hide the objects


@dataclass(frozen=True)
class ReportConfig:
    """Write RUN/report.html: what the run is, how good it is beside chance, its slots in pictures, its curves."""

    run: tyro.conf.Positional[Path]
    """Run folder, written by `nsi train`; with `nsi eval RUN --split test` before it the report has its figures."""


def run(config: ReportConfig) -> None:
    """Writes the report and prints where it is."""
    target = config.run / runfolder.REPORT
    page = render(config.run)
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    print(f"report: {target}")


def render(folder: Path) -> str:
    """The report as HTML. Raises UserError where the folder is no run, or a file of it cannot be read."""
    import jinja2

    if not (folder / runfolder.CONFIG).is_file():
        raise UserError(f"{folder}: no run (it has no {runfolder.CONFIG}); give the --log_path of `nsi train`")
    recorded = _read_json(folder / runfolder.CONFIG)
    metrics, validation = (standing_lines(folder, name) for name in (runfolder.METRICS, runfolder.VALIDATION))
    attempts = read_attempts(folder / runfolder.ATTEMPTS)
    evals = _evals(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": share, "fraction": fraction, "count": count, "spread": spread}
    environment.globals["pick"] = pick
    return environment.get_template(TEMPLATE).render(
        name=folder.resolve().name,
        folder=folder,
        facts=_facts(recorded, metrics, attempts),
        evals=evals,
        main=evals[0] if evals else None,
        scenes=_scenes(folder, evals[0]) if evals else [],
        last_validation=validation[-1] if validation else None,
        charts=_charts(recorded, metrics, validation, attempts),
        tied=bool(evals) and _ties(evals[0]),
        broken_steps=[line["step"] for line in metrics if _is_broken(line.get("loss"))],
        settings=_settings(recorded.get("config")),
        recorded=recorded,
        attempts=attempt_rows(folder, attempts),
        spent=time_rows(folder, attempts),
    )


def pick(content: Any, *path: str) -> Any:
    """What lies at a path of nested dictionaries; None where the path ends early."""
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def share(value: Any) -> str:
    """A fraction in percent, with a space that does not break."""
    if not _is_number(value):
        return UNKNOWN
    return f"{100 * value:.{'2g' if 0 < value < 0.01 else '1f'}}\u00a0%"


def fraction(value: Any) -> str:
    """A figure that is usually printed as a fraction."""
    return f"{value:.3f}" if _is_number(value) else UNKNOWN


def count(value: Any) -> str:
    """A number with its thousands set apart; a whole one without decimals."""
    if not _is_number(value):
        return UNKNOWN if value is None or isinstance(value, float) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:,.1f}"


def spread(value: Any, samples: Any) -> str:
    """Half the 95 % interval of a share of so many samples, in points (normal approximation)."""
    if not _is_number(value) or not _is_number(samples) or samples < 1 or not 0 <= value <= 1:
        return ""
    return f"±{196 * math.sqrt(value * (1 - value) / samples):.1f}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def _evals(folder: Path) -> list[dict[str, Any]]:
    """The figures of every split that was evaluated, the test split first."""
    found = []
    for path in sorted(folder.glob(runfolder.eval_path(Path(), "*").name)):
        content = _read_json(path)
        found.append({**content, "split": content.get("split", path.stem.removeprefix("eval-"))})
    return sorted(found, key=lambda content: content["split"] != FIRST_SPLIT)


def _facts(recorded: dict[str, Any], metrics: list[dict], attempts: list[Attempt]) -> dict[str, Any]:
    """What the first sentence says."""
    rates = [line["images_per_second"] for line in metrics if _is_number(line.get("images_per_second"))]
    worlds = [attempt.world_size for attempt in attempts] or [line.get("world_size") for line in metrics[-1:]]
    return {
        "backbone": pick(recorded, "backbone", "name") or pick(recorded, "config", "backbone", "backbone"),
        "steps": metrics[-1]["step"] if metrics else None,
        "epoch": metrics[-1].get("epoch") if metrics else None,
        "batch": pick(recorded, "config", "optim", "batch_size"),
        "worlds": [world for place, world in enumerate(worlds) if world and world not in worlds[:place]],
        "attempts": len(attempts),
        "left_out": sum(line.get("nonfinite_steps") or 0 for line in metrics),
        "images_per_second": float(np.median(rates)) if rates else None,
        "started": when(attempts[0].started) if attempts else None,
        "split_sizes": {split: pick(recorded, "data", split) for split in ("train", "val", "test")},
    }


def _charts(
    recorded: dict[str, Any], metrics: list[dict], validation: list[dict], attempts: list[Attempt]
) -> dict[str, Any]:
    """The curves by name, as markup; empty ones where the run has nothing to draw."""
    from markupsafe import Markup

    from launch.reporting.figures import Role, Series, chart

    def series(lines: list[dict], key: str, role: Role, dots: bool = False) -> Series:
        return Series(role, [line["step"] for line in lines], [line.get(key) for line in lines], dots)

    def both(key: str) -> list[Series]:
        return [series(metrics, key, "train"), series(validation, key, "validation", dots=True)]

    marks = [attempt.restored_step for attempt in attempts if attempt.restored_step > 0]
    batch = pick(recorded, "config", "optim", "batch_size")
    loss_level = (math.log(batch), f"chance: ln {batch} = {math.log(batch):.2f}") if _is_number(batch) else None
    chance = validation[-1].get("chance_R@5") if validation else None
    recall_level = (chance, f"chance: {share(chance)}") if _is_number(chance) else None
    recall = [
        series(validation, "image_to_schema_R@5", "train", dots=True),
        series(validation, "schema_to_image_R@5", "validation", dots=True),
    ]
    small = (3.9, 1.6)
    drawn = {
        "contrastive": chart("contrastive", both("contrastive"), loss_level, marks),
        "reconstruction": chart("reconstruction", both("reconstruction"), None, marks),
        "recall": chart("recall", recall, recall_level, marks, percent=True),
        "lr": chart(
            "lr",
            [Series("other", [line["step"] for line in metrics], [line.get("lr") for line in metrics], noisy=False)],
            None,
            marks,
            small,
        ),
        "throughput": chart("throughput", [series(metrics, "images_per_second", "other")], None, marks, small),
        "grad_norm": chart("grad-norm", [series(metrics, "grad_norm", "other")], None, marks, small),
    }
    return {name: Markup(svg) for name, svg in drawn.items()}


def _scenes(folder: Path, main: dict[str, Any]) -> list[dict[str, Any]]:
    """The scenes with their slots as the page shows them."""
    path = runfolder.scenes_path(folder, main["split"])
    if not path.is_file():
        return []
    try:
        with np.load(path) as file:
            images_KHW3, truth_KHW, segments_KHW = (file[name] for name in ("images_KHW3", "truth_KHW", "segments_KHW"))
            described = json.loads(file["scenes"].item())
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write it again with `nsi eval {folder}`") from None
    return [_scene(*parts) for parts in zip(images_KHW3, truth_KHW, segments_KHW, described, strict=True)]


def _scene(
    image_HW3: np.ndarray, truth_HW: np.ndarray, segments_HW: np.ndarray, described: dict[str, Any]
) -> dict[str, Any]:
    from launch.reporting.figures import SMALLEST_SHARE, outline, photo, slot_colour, slot_shapes, text_colour

    primitives = []
    for place, primitive in enumerate(described["primitives"]):
        slot = int(primitive["slot"])
        overlaps = _overlaps(truth_HW == place + 1, segments_HW)
        kind, _, material = primitive["text"].partition(", ")
        primitives.append(
            {
                "kind": kind,
                "material": material.replace("_", " "),
                "slot": slot,
                "colour": slot_colour(slot),
                "ink": text_colour(slot_colour(slot)),
                "visible": bool(overlaps),
                "overlap": overlaps.get(slot, 0.0),
                "best": bool(overlaps) and overlaps.get(slot, 0.0) == max(overlaps.values()),
            }
        )
    taken = {primitive["slot"] for primitive in primitives}
    shapes = [
        {
            **vars(shape),
            "colour": slot_colour(shape.slot),
            "ink": text_colour(slot_colour(shape.slot)),
            "taken": shape.slot in taken,
            "wide": shape.share > WIDE_SHARE,
            "named": shape.slot in taken or shape.share >= SMALLEST_SHARE,
        }
        for shape in slot_shapes(segments_HW)
    ]
    visible = [primitive for primitive in primitives if primitive["visible"]]
    return {
        **described,
        "primitives": primitives,
        "shapes": shapes,
        "photo": photo(image_HW3),
        "truth": "".join(outline(truth_HW == each) for each in np.unique(truth_HW[truth_HW > 0])),
        "height": image_HW3.shape[0],
        "width": image_HW3.shape[1],
        "scale": round(image_HW3.shape[1] / LABEL_WIDTH, 3),
        "right": sum(primitive["best"] for primitive in visible),
        "covered": sum(primitive["best"] and primitive["overlap"] >= IOU_THRESHOLD for primitive in visible),
        "visible": len(visible),
    }


def _overlaps(object_HW: np.ndarray, segments_HW: np.ndarray) -> dict[int, float]:
    """Intersection over union of one object and every slot that touches it; empty for an object out of sight."""
    found = {}
    for slot in np.unique(segments_HW[object_HW]).tolist():
        segment_HW = segments_HW == slot
        found[slot] = float((object_HW & segment_HW).sum() / (object_HW | segment_HW).sum())
    return found


def _ties(main: dict[str, Any]) -> bool:
    parts = [pick(main, "retrieval", name) or {} for name in ("image_to_schema", "schema_to_image")]
    return any(part.get(f"{key}_optimistic", value) != value for part in parts for key, value in part.items())


def _settings(config: Any) -> list[dict[str, Any]]:
    """The configuration in its parts: each flag, its value, the default, and whether they differ."""
    from launch.config import TrainConfig, to_json

    plain = to_json(TrainConfig("", Path()))
    groups: dict[str, list[dict[str, Any]]] = {"run": []}
    for name, value in (config if isinstance(config, dict) else {}).items():
        part = value if isinstance(value, dict) else {name: value}
        defaults = plain.get(name) if isinstance(value, dict) else plain
        rows = groups.setdefault(name if isinstance(value, dict) else "run", [])
        for flag, chosen in part.items():
            default = pick(defaults, flag)
            given = flag not in ("data_path", "log_path") and chosen != default
            rows.append({"flag": flag, "value": chosen, "default": default, "changed": given})
    return [{"name": name, "rows": rows} for name, rows in groups.items() if rows]
