"""`nsi eval RUN --split test`: retrieval, object discovery and grounding on held-out scenes.

Writes RUN/eval-SPLIT.json, and RUN/eval-SPLIT-scenes.npz with a few scenes for the report's pictures.
Shapes: B rows, N slots, T objects, P patches, E embedding size, S scenes of the split, H x W pixels of a frame.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from cluster.checkpoints.folder import checkpoint_path
from cluster.processes import use_gpus
from launch import runfolder
from launch.config import TrainConfig, from_json
from launch.progress import progress
from launch.training.build import make_backbone, make_model, standing_before
from launch.training.choose import trained_checkpoint
from launch.training.validation import VALIDATION_STEP
from nsi.backbone import parameters_hash
from nsi.batch import Batch
from nsi.errors import UsageError, UserError
from nsi.maxsim import maxsim
from nsi.metrics.discovery import Discovery, contingency, discovery, summarise_discovery
from nsi.metrics.grounding import Grounding, grounding, summarise_grounding
from nsi.metrics.retrieval import ranks, retrieval, schema_groups
from nsi.metrics.view import OFFICIAL_VIEW, peaks, segments, view_alphas, view_masks
from nsi.model import NeuralSlotInterpreter, Output, load_trained
from nsi.noise import KeyedNoise
from nsi.schema import Vocabulary
from shards.decode import decode_image_frame, decode_mask, resize
from shards.loading.loader import check_fits, refuse_faults, whole_split
from shards.loading.rows import SceneShape
from shards.loading.workers import open_workers
from shards.reading.dataset import Split, open_split

SCENES_SHOWN = 12


@dataclass(frozen=True)
class EvalConfig:
    """Measure a run on held-out scenes: retrieval beside chance, FG-ARI, mBO and mIoU, grounding beside its floor."""

    run: tyro.conf.Positional[Path]
    """Run folder, written by `nsi train`."""
    split: str = "test"
    """Which split of the shards: test, val or train."""
    checkpoint: str = "best"
    """best: the step with the best validation (`nsi train --select_by`); last: the newest one; or a step's number."""
    data_path: str = ""
    """Shards to read, where they have moved since training."""
    batch_size: int = 64
    """Scenes embedded at once; changes no figure."""
    num_workers: int = 2
    """Processes that read and decode ahead."""


@dataclass(frozen=True)
class SceneResult:
    """What one scene leaves behind: figures that need its masks, and embeddings for the whole gallery."""

    slots_NE: torch.Tensor
    primitives_TE: torch.Tensor
    objects_T: torch.Tensor
    labels_T3: torch.Tensor
    positions_T3: torch.Tensor
    decoder: MaskResult | None  # None where the data has no masks
    attention: MaskResult | None


@dataclass(frozen=True)
class MaskResult:
    """One scene's slots against its true mask, the slots drawn by one kind of mask."""

    discovery: Discovery
    grounding: Grounding


def run(config: EvalConfig) -> None:
    """Evaluates a run and writes what was found."""
    if config.batch_size < 1 or config.num_workers < 1:
        raise UsageError("--batch_size and --num_workers must be at least 1")
    checkpoint = trained_checkpoint(
        config.run, config.checkpoint, lambda text: print(f"nsi eval: {text}", file=sys.stderr)
    )
    trained = from_json(TrainConfig, checkpoint.facts["config"])
    if not (data_path := config.data_path or trained.data_path):
        raise UsageError(f"{config.run}: names no shards; give --data_path")
    if (own := config.run / runfolder.BACKBONE).is_file():  # an imported model's, which moves with its run
        trained = replace(trained, backbone=replace(trained.backbone, backbone_weights=own))
    split = open_split(data_path, config.split)
    check_fits(split, trained.data.max_program_len)
    if split.manifest.vocabulary.fingerprint() != checkpoint.facts["vocabulary_fingerprint"]:
        raise UserError(f"{split.folder}: has another schema than {config.run} was trained on; give the same shards")
    backbone = make_backbone(trained.backbone, trained.data.image_size)
    if parameters_hash(backbone) != checkpoint.facts["backbone_hash"]:
        raise UserError(f"{config.run}: was trained on other backbone weights; put the same file back in its place")
    model = make_model(trained, split.manifest.vocabulary, backbone)
    load_trained(model, checkpoint.training.parameters)
    device = torch.device("cuda" if use_gpus() else "cpu")
    model.to(device).eval()
    backbone = standing_before(trained.backbone, backbone).to(device)

    results: list[SceneResult] = []
    frames: list[dict[str, Any]] = []
    shape = SceneShape(trained.data.image_size, trained.data.max_program_len, trained.data.squash_size)
    with (
        open_workers(config.num_workers) as workers,
        progress(f"evaluating {config.split}", len(split), unit="scenes") as advance,
        torch.inference_mode(),
    ):
        for cpu_batch in map(refuse_faults, whole_split(split, shape, config.batch_size, 0, 1, workers)):
            output = _embed(model, backbone, cpu_batch.to(device), trained.optim.seed)
            for row in range(int(cpu_batch.rows_B.sum())):
                result = _scene(split, cpu_batch, output, row, backbone.grid)
                results.append(result)
                if len(frames) < SCENES_SHOWN:
                    frames.append(_frame(split, cpu_batch, output, row, backbone.grid, result))
            advance(len(results))
    figures, scores_SS = _figures(results, trained, split.manifest.vocabulary)
    content = {
        "split": config.split,
        "step": checkpoint.step,
        "checkpoint": checkpoint_path(Path(), checkpoint.step).name,
        "samples": len(split),
        "data_fingerprint": split.manifest.fingerprint,
        "view": OFFICIAL_VIEW.describe(),
        "position_dims": trained.model.position_dims,
        "slot_seed": trained.optim.seed,
        **figures,
    }
    # The pictures show the masks that lie better on the objects, and say which they are.
    content["pictures"] = max(("decoder", "attention"), key=lambda kind: _overlap(content, kind))
    _write(config, content, frames, scores_SS)
    print(_summary(content))
    print(f"written to {runfolder.eval_path(config.run, config.split)}; next: nsi report {config.run}")


def _embed(model: NeuralSlotInterpreter, backbone: torch.nn.Module, batch: Batch, seed: int) -> Output:
    noise = KeyedNoise(seed, VALIDATION_STEP, batch.sample_ids_B)
    output = model(backbone(batch.images_BCHW), batch.labels_BT3, batch.positions_BT3, batch.objects_BT, noise)
    return Output(*(tensor.cpu() for tensor in output))


def _scene(split: Split, batch: Batch, output: Output, row: int, grid: tuple[int, int]) -> SceneResult:
    """What one scene leaves behind; its slots are compared with its true mask, if it has one, in the official view."""
    objects = int(batch.objects_BT[row].sum())
    slots_NE = output.slot_embeddings_BNE[row]
    primitives_TE = output.primitive_embeddings_BTE[row]
    similarity_TN = (primitives_TE[:objects] @ slots_NE.T).double().numpy()
    sizes_T = batch.labels_BT3[row, :objects, 0].numpy()

    def compare(masks_NP: torch.Tensor) -> MaskResult | None:
        if split.manifest.mask_size is None:
            return None
        mask_HW = split.decode(int(batch.sample_ids_B[row]), "mask", decode_mask)
        seen = _seen(masks_NP, grid, mask_HW)
        table_TN = contingency(seen.segments_SS, seen.truth_SS, slots=len(slots_NE), objects=objects)
        peak_ids_N = seen.truth_SS.ravel()[seen.peaks_N]
        return MaskResult(discovery(table_TN), grounding(similarity_TN, table_TN, peak_ids_N, sizes_T))

    return SceneResult(
        slots_NE=slots_NE,
        primitives_TE=primitives_TE,
        objects_T=batch.objects_BT[row].clone(),  # copies, since a view would keep the whole batch
        labels_T3=batch.labels_BT3[row].clone(),
        positions_T3=batch.positions_BT3[row].clone(),
        decoder=compare(output.alphas_BNP[row]),
        attention=compare(output.attention_BNP[row]),
    )


@dataclass(frozen=True)
class Seen:
    """One scene in the official view: slot ids, object ids, and each slot's peak as a flat pixel index."""

    segments_SS: np.ndarray
    truth_SS: np.ndarray
    peaks_N: np.ndarray


def _seen(masks_NP: torch.Tensor, grid: tuple[int, int], mask_HW: np.ndarray) -> Seen:
    view, (height, width) = OFFICIAL_VIEW, mask_HW.shape
    alphas_1NSS = view_alphas(masks_NP.unflatten(-1, grid)[None], (height, width), view)
    return Seen(segments(alphas_1NSS)[0].numpy(), view_masks(mask_HW, view), peaks(alphas_1NSS)[0].numpy())


def _figures(
    results: list[SceneResult], trained: TrainConfig, vocabulary: Vocabulary
) -> tuple[dict[str, Any], torch.Tensor]:
    """The figures of the whole split, and the score of every image (row) and schema (column)."""
    slots_SNE = torch.stack([result.slots_NE for result in results])
    primitives_STE = torch.stack([result.primitives_TE for result in results])
    objects_ST = torch.stack([result.objects_T for result in results])
    scores_SS = maxsim(slots_SNE, primitives_STE, objects_ST, trained.loss.score)
    if not scores_SS.isfinite().all():
        raise UserError(
            "the model gives scores that are no finite numbers, so its weights have gone astray; evaluate an earlier "
            "checkpoint with --checkpoint"
        )
    groups_S = schema_groups(
        torch.stack([result.labels_T3 for result in results]),
        objects_ST,
        torch.stack([result.positions_T3 for result in results])[..., : trained.model.position_dims],
    )
    figures = {
        "retrieval": retrieval(scores_SS, groups_S).as_dict(),
        **_mask_figures([result.decoder for result in results], vocabulary),
        # Slot attention's own masks, from which slots take what they know: the decoder's may lag far behind them.
        "attention": _mask_figures([result.attention for result in results], vocabulary),
    }
    return figures, scores_SS


def _mask_figures(results: list[MaskResult | None], vocabulary: Vocabulary) -> dict[str, Any]:
    """Discovery and grounding with one kind of mask; None each where the data has no masks to compare with."""
    found = [result for result in results if result]
    if not found:
        return {"discovery": None, "grounding": None}
    return {
        "discovery": summarise_discovery([result.discovery for result in found]).as_dict(),
        "grounding": summarise_grounding([result.grounding for result in found], vocabulary.sizes),
    }


def _frame(
    split: Split, batch: Batch, output: Output, row: int, grid: tuple[int, int], result: SceneResult
) -> dict[str, Any]:
    """One scene for the report: its picture, its true and its found segments, and which slot each primitive took."""
    sample = int(batch.sample_ids_B[row])
    width, height = split.manifest.mask_size or split.manifest.image_size
    masked = split.manifest.mask_size is not None
    mask_HW = split.decode(sample, "mask", decode_mask) if masked else np.zeros((height, width), np.uint8)
    frame_HW3 = split.decode(sample, "image", decode_image_frame)
    image_HW3 = np.asarray(resize(Image.fromarray(frame_HW3), (width, height)))  # shards may hold smaller images

    def segments_of(masks_NP: torch.Tensor) -> np.ndarray:
        masks_1NGG = masks_NP.unflatten(-1, grid)[None].float()
        masks_1NHW = torch.nn.functional.interpolate(masks_1NGG, (height, width), mode="bilinear")
        return masks_1NHW.argmax(dim=1)[0].numpy().astype(np.uint8)

    chosen_T = (result.primitives_TE @ result.slots_NE.T).argmax(dim=1)
    primitives = []
    for place in range(int(result.objects_T.sum())):
        size, shape, material = split.manifest.vocabulary.decode(*result.labels_T3[place].tolist())
        primitives.append(
            {
                "text": f"{size} {shape}, {material}",
                "slot": int(chosen_T[place]),
                "position": [round(value, 2) for value in result.positions_T3[place].tolist()],
            }
        )
    return {
        "image": image_HW3,
        "truth": mask_HW,
        "decoder": segments_of(output.alphas_BNP[row]),
        "attention": segments_of(output.attention_BNP[row]),
        "scene": {"key": batch.keys[row], "primitives": primitives},
    }


def _write(config: EvalConfig, content: dict[str, Any], frames: list[dict[str, Any]], scores_SS: torch.Tensor) -> None:
    own_S = torch.arange(len(scores_SS))
    schema_ranks_S, image_ranks_S = ranks(scores_SS, own_S)[0], ranks(scores_SS.T, own_S)[0]
    scenes = [
        {**frame["scene"], "schema_rank": int(schema_ranks_S[place]), "image_rank": int(image_ranks_S[place])}
        for place, frame in enumerate(frames)
    ]
    pictures = runfolder.scenes_path(config.run, config.split)
    temporary = pictures.with_name(pictures.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            images_KHW3=np.stack([frame["image"] for frame in frames]),
            truth_KHW=np.stack([frame["truth"] for frame in frames]),
            segments_KHW=np.stack([frame[content["pictures"]] for frame in frames]),
            scenes=np.array(json.dumps(scenes)),
        )
    temporary.rename(pictures)
    target = runfolder.eval_path(config.run, config.split)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(target)


def _overlap(content: dict[str, Any], kind: str) -> float:
    part = content["attention"] if kind == "attention" else content
    return (part["discovery"] or {}).get("mBO") or 0.0


def _summary(content: dict[str, Any]) -> str:
    """The figures in a few lines, each beside what it has to be compared with."""
    found = content["retrieval"]
    lines = [
        f"step {content['step']}, {content['split']} split: {found['gallery']} scenes, all of them the gallery",
        "                     R@1     R@5    R@10   median rank",
    ]
    for name in ("schema_to_image", "image_to_schema"):
        part = found[name]
        lines.append(f"  {name:16} {part['R@1']:7.3f} {part['R@5']:7.3f} {part['R@10']:7.3f}   {part['median_rank']:g}")
    chance = found["chance"]
    lines.append(f"  {'chance':16} {chance['R@1']:7.3f} {chance['R@5']:7.3f} {chance['R@10']:7.3f}")
    if content["discovery"] is None:
        return "\n".join([*lines, "  this data has no masks, so there are no figures of discovery and grounding"])
    for kind, part in (("decoder", content), ("attention", content["attention"])):
        seen, tied = part["discovery"], part["grounding"]
        accuracy = {name: tied[name]["slot_accuracy"] for name in ("argmax", "floor", "oracle")}
        lines.append(
            f"  {kind + ' masks':16} FG-ARI {seen['FG-ARI']:.3f}, mBO {seen['mBO']:.3f}, mIoU {seen['mIoU']:.3f}; "
            f"grounding {accuracy['argmax']:.3f} (random {accuracy['floor']:.3f}, at most {accuracy['oracle']:.3f})"
        )
    lines.append(f"  masks: {content['view']}; grounding: objects whose best slot by score is their best slot by mask")
    return "\n".join(lines)
