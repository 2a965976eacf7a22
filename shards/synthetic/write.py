"""Synthetic scenes on disk, in CLEVRTex v2's layout, from any number of processes.

    OUT/synth.json                                         what the folder was made with
    OUT/clevrtexv2_full/<i // 1000>/CLEVRTEXv2_full_NNNNNN/
        CLEVRTEXv2_full_NNNNNN.json                        the scene
        CLEVRTEXv2_full_NNNNNN_0003.png                    the image
        CLEVRTEXv2_full_NNNNNN_flat_0003.png               the mask: pixel value = object index

A scene's folder gets its name last, when its files are complete, so that a run that was cut off leaves no half
scene, and the next run takes up where it stopped. JSON and pixels are equal on every machine; so are the PNGs' bytes,
unless Pillow was built with a compressor that packs runs in another way.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nsi.errors import UserError
from shards.processes import as_they_end, process_pool
from shards.synthetic.layout import describe
from shards.synthetic.render import render_scene

VARIANT = "clevrtexv2_full"
GENERATION = 1  # of the renderer: raised whenever the same seed gives other scenes, so that two never mix
_CHUNK = 32  # scenes that a worker renders between two reports
_RLE = 3  # zlib's strategy for runs: of textures it makes files as small as the default does, in 3/4 of the time
# Colours for the eye alone (a reader takes the values): the ground, then up to ten objects. Filled up to 256, since
# Pillow packs the pixels of a short palette into fewer bits, each version in its own way.
_COLOURS = bytes.fromhex("000000 ff0040 00aa3c 285aff ffd700 8dd3c7 bebada fb8072 fdb462 b3de69 bc80bd")
_PALETTE = _COLOURS.ljust(3 * 256, b"\0")


def write_scenes(
    out: Path, scenes: int, seed: int, size: tuple[int, int], workers: int, report: Callable[[int], None]
) -> None:
    """Write scenes 0 to `scenes - 1` of a seed at (width, height) below `out`, but for those already there.

    `report` is told how many scenes are finished: first those found, then as more are.
    Raises UserError where `out` holds other scenes or can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, seed, size)
        missing = [index for index in range(scenes) if not is_finished(out, index)]
        done = scenes - len(missing)
        report(done)
        chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
        if workers == 1 or len(chunks) <= 1:
            for index in missing:
                write_scene(out, seed, size, index)
                done += 1
                report(done)
            return
        with process_pool(min(workers, len(chunks)), out) as pool:
            for count in as_they_end(pool, functools.partial(_write_chunk, out, seed, size), chunks):
                done += count
                report(done)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; give a folder that you can write to, with space left"
        ) from error


def write_scene(out: Path, seed: int, size: tuple[int, int], index: int) -> None:
    """Render scene `index` and write its folder."""
    render = render_scene(seed, index, size)
    name, folder = scene_name(index), scene_folder(out, index)
    partial = folder.with_name(f"{name}.partial")
    for leftover in (partial, folder):  # of a run that was cut off, or a scene that lost a file
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    description = describe(render.layout, name, index)
    (partial / f"{name}.json").write_text(json.dumps(description))
    image, mask = Image.fromarray(render.image_HW3), _mask_image(render.mask_HW)
    image.save(partial / f"{name}_0003.png", compress_level=1, compress_type=_RLE)
    mask.save(partial / f"{name}_flat_0003.png", compress_level=1, compress_type=_RLE)
    partial.rename(folder)


def is_finished(out: Path, index: int) -> bool:
    """Whether the scene stands there with all its files, none of them empty."""
    folder, name = scene_folder(out, index), scene_name(index)
    try:
        return all(
            os.stat(folder / f"{name}{ending}").st_size > 0 for ending in (".json", "_0003.png", "_flat_0003.png")
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def scene_name(index: int) -> str:
    """CLEVRTex's name of a scene."""
    return f"CLEVRTEXv2_full_{index:06d}"


def scene_folder(out: Path, index: int) -> Path:
    """Where a scene's files stand."""
    return out / VARIANT / str(index // 1000) / scene_name(index)


def _write_chunk(out: Path, seed: int, size: tuple[int, int], indices: Sequence[int]) -> int:
    """What a worker does: some scenes one after the other. Returns how many."""
    for index in indices:
        write_scene(out, seed, size, index)
    return len(indices)


def _claim(out: Path, seed: int, size: tuple[int, int]) -> None:
    """Note what the folder is made with, or refuse one that was made with anything else."""
    record, ours = out / "synth.json", {"seed": seed, "size": list(size), "generation": GENERATION}
    try:
        theirs = json.loads(record.read_text())
    except FileNotFoundError:
        if (out / VARIANT).exists():
            raise UserError(
                f"{out} already holds {VARIANT} scenes that nsi synth did not write; give another folder"
            ) from None
        partial = record.with_name("synth.json.partial")
        partial.write_text(json.dumps(ours) + "\n")
        partial.replace(record)
        return
    except ValueError:
        theirs = None
    if theirs != ours:
        raise UserError(
            f"{out} holds scenes made with {_words(theirs)}, not with {_words(ours)}; "
            "give another folder, or the same arguments to continue it"
        )


def _words(arguments: object) -> str:
    """What a synth.json says, for a message."""
    if not isinstance(arguments, dict):
        return "arguments that can't be read in its synth.json"
    try:
        width, height = arguments["size"]
        generation = arguments["generation"]
        version = "" if generation == GENERATION else f" by generation {generation} of the renderer"
        return f"--seed {arguments['seed']} --size {width}x{height}{version}"
    except (KeyError, TypeError, ValueError):
        return "arguments that can't be read in its synth.json"


def _mask_image(mask_HW: np.ndarray) -> Image.Image:
    """The mask as a palette image, whose pixel values are the indices."""
    image = Image.fromarray(mask_HW)
    image.putpalette(_PALETTE)
    return image
