"""A synthetic scene as pixels: texture, light and shadow on what `shapes.rasterise` found.

Pixels are words of four bytes (red, green, blue, unused) until the end. Legend: H, W frame; h, w the box around
one object; P visible pixels of one object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shards.synthetic import shapes
from shards.synthetic.camera import Camera, Vector, normalised, rotation_of
from shards.synthetic.draws import Draws
from shards.synthetic.layout import Layout, Thing, sample_frame, sample_things
from shards.synthetic.materials import Texture, texture_of
from shards.synthetic.patterns import SIDE

FEWEST_PIXELS = 200  # every object shows more than this in a 320x240 frame, proportionally in others
GROUND_TILE = 2.4  # metres of ground along one texture tile
_FAR = 40.0  # the ground is drawn up to this depth; beyond it a tall frame repeats the last row's
_OFFSET = 64.0  # whole tiles added to texture places, so that they are positive and truncation is a floor
_SIDES = np.array([SIDE >> halvings for halvings in range(SIDE.bit_length())], dtype=np.float32)
_LIMITS = np.float32(1.4 * SIDE) / _SIDES[:-1]  # texels under a pixel from which on the next smaller size is used
_ATTEMPTS = 10_000  # a scene takes 3 of them, seldom 50: so many mean a defect, which must not hang a run
_SHADOW = 0.55  # how much light the middle of a shadow loses


@dataclass(frozen=True)
class Render:
    """A finished scene: what is in it, its image and its mask of object indices."""

    layout: Layout
    image_HW3: np.ndarray  # uint8
    mask_HW: np.ndarray  # uint8


def render_scene(seed: int, index: int, size: tuple[int, int]) -> Render:
    """Scene `index` of a seed at (width, height): the same on every machine, whatever else is drawn.

    Objects are sampled anew until each of them shows enough pixels; texture is spent on the last attempt alone.
    """
    draws = Draws(seed, index)
    frame, count = sample_frame(draws, size)
    fewest = FEWEST_PIXELS * frame.camera.scale() ** 2
    for _ in range(_ATTEMPTS):
        things = sample_things(draws, frame.camera, count)
        if things is None:
            continue
        layout = replace(frame, things=things)
        raster = shapes.rasterise(layout)
        pixels = np.bincount(raster.mask_HW.ravel(), minlength=count + 1)
        if pixels[1:].min() > fewest:
            return Render(layout, shade(layout, raster), raster.mask_HW)
    raise RuntimeError(f"scene {index} of seed {seed} at {size}: no arrangement of {count} objects shows them all")


def shade(layout: Layout, raster: shapes.Raster) -> np.ndarray:
    """The image (H, W, 3) of a scene whose visible surfaces are known."""
    frame_HW = _ground(layout)
    x_W, y_H = shapes.screen_axes(layout.camera)
    for index, (thing, box) in enumerate(zip(layout.things, raster.boxes, strict=True), 1):
        rows_P, columns_P = np.nonzero(raster.mask_HW[box] == index)
        rows_P, columns_P = rows_P + box[0].start, columns_P + box[1].start
        frame_HW[rows_P, columns_P] = _surface(
            thing,
            layout,
            (x_W[columns_P], y_H[rows_P]),
            raster.depth_HW[rows_P, columns_P],
            raster.part_HW[rows_P, columns_P],
        )
    _soften_edges(frame_HW, raster.mask_HW)
    return np.ascontiguousarray(_bytes(frame_HW)[..., :3])


def _ground(layout: Layout) -> np.ndarray:
    """The ground under its light and the objects' shadows, as words (H, W). No roll: a row has one depth."""
    camera, texture = layout.camera, texture_of(layout.ground)
    x_W, y_H = shapes.screen_axes(camera)
    position, forward, right, up = camera.position, camera.forward, camera.right, camera.up
    fall_H = np.maximum(-(forward[2] + y_H * np.float32(up[2])), np.float32(position[2] / _FAR))
    depth_H1 = (np.float32(position[2]) / fall_H)[:, None]
    ground_x_HW, ground_y_HW = (
        (position[axis] + depth_H1 * (forward[axis] + y_H[:, None] * np.float32(up[axis])))
        + (depth_H1 * np.float32(right[axis])) * x_W
        for axis in (0, 1)
    )
    # A pixel covers more ground along the view than across it; the mean of the two picks the texture's size.
    texels_H1 = depth_H1 * np.sqrt(depth_H1 / np.float32(position[2])) * (SIDE / GROUND_TILE / camera.focal)
    side_H1, start_H1 = _sizes(texture, texels_H1)
    u_HW = (ground_x_HW * np.float32(1.0 / GROUND_TILE) + _OFFSET) * side_H1
    v_HW = (ground_y_HW * np.float32(1.0 / GROUND_TILE) + _OFFSET) * side_H1
    whole_side_H1 = side_H1.astype(np.int32)
    place_HW = v_HW.astype(np.int32) & (whole_side_H1 - 1)
    place_HW *= whole_side_H1
    place_HW += u_HW.astype(np.int32) & (whole_side_H1 - 1)
    place_HW += start_H1
    # A lamp above the middle: the light falls off with the distance from it, and never exceeds one.
    light_HW = 30.0 / (30.0 + 0.28 * (ground_x_HW * ground_x_HW + ground_y_HW * ground_y_HW))
    for thing in layout.things:
        _cast_shadow(light_HW, ground_x_HW, ground_y_HW, thing, layout.light, camera)
    gain_HW1 = (light_HW * 256.0).astype(np.uint16)[..., None]
    return _words(((_bytes(texture.texels[place_HW]) * gain_HW1) >> 8).astype(np.uint8))


def _cast_shadow(
    light_HW: np.ndarray, x_HW: np.ndarray, y_HW: np.ndarray, thing: Thing, light: Vector, camera: Camera
) -> None:
    """Darken the ground in a soft ellipse that leans away from the light, in place."""
    lean_x, lean_y = -light[0] / light[2], -light[1] / light[2]  # metres of shadow for a metre of height
    radius = 1.3 * (thing.half if thing.shape != "cube" else 1.25 * thing.half)
    stretch_square = 1.0 + lean_x * lean_x + lean_y * lean_y
    middle_x, middle_y = thing.x + lean_x * thing.half, thing.y + lean_y * thing.half
    reach = radius * stretch_square  # not less than the ellipse's long half axis
    corners = [camera.project((middle_x + sx * reach, middle_y + sy * reach, 0.0)) for sx in (-1, 1) for sy in (-1, 1)]
    if min(depth for _, _, depth in corners) < 0.5:
        return
    columns = slice(max(int(min(x for x, _, _ in corners)), 0), max(int(max(x for x, _, _ in corners)) + 1, 0))
    rows = slice(max(int(min(y for _, y, _ in corners)), 0), max(int(max(y for _, y, _ in corners)) + 1, 0))
    off_x_hw, off_y_hw = x_HW[rows, columns] - middle_x, y_HW[rows, columns] - middle_y
    along_hw = off_x_hw * lean_x + off_y_hw * lean_y
    # |off|^2 less what the lean accounts for: along the lean the ellipse is sqrt(stretch_square) times as long.
    square_hw = off_x_hw * off_x_hw + off_y_hw * off_y_hw - along_hw * along_hw * (1.0 / stretch_square)
    dark_hw = np.clip(1.35 - square_hw * (1.35 / (radius * radius)), 0.0, 1.0)
    light_HW[rows, columns] *= 1.0 - _SHADOW * dark_hw


def _surface(
    thing: Thing, layout: Layout, screen: tuple[np.ndarray, np.ndarray], depth_P: np.ndarray, part_P: np.ndarray
) -> np.ndarray:
    """The visible pixels of one object as words (P,)."""
    rays, texture = shapes.local_rays(thing, layout.camera), texture_of(thing.material)
    point = [o + d * depth_P for o, d in zip(rays.origin, rays.directions(*screen), strict=True)]
    normal = _normal(thing.shape, point, part_P)
    u_P, v_P = _texture_places(thing.shape, point, normal, part_P)
    centre_depth = layout.camera.project(thing.centre)[2]
    texels = SIDE * centre_depth / (layout.camera.focal * thing.half)  # of a tile one unit long, at one pixel
    side, start = _sizes(texture, np.array([texels], dtype=np.float32))
    whole_side, side = int(side[0]), float(side[0])
    u_P = ((u_P + _OFFSET) * side).astype(np.int32) & (whole_side - 1)
    v_P = ((v_P + _OFFSET) * side).astype(np.int32) & (whole_side - 1)
    color_P4 = _bytes(texture.texels[v_P * whole_side + u_P + int(start[0])]).astype(np.float32)

    cosine, sine = rotation_of(thing.rotation)
    to_light = _turned(layout.light, cosine, sine)
    facing_P = normal[0] * to_light[0] + normal[1] * to_light[1] + normal[2] * to_light[2]
    # Light from the lamp, from the sky, and less of both near the ground, where the object shuts it out.
    light_P = 0.34 + 0.64 * np.maximum(facing_P, 0.0) + 0.16 * normal[2]
    light_P *= np.minimum(0.72 + 0.5 * (point[2] + 1.0), 1.0)
    if thing.shape == "monkey":
        eyes_P = (part_P == shapes.MONKEY_EYES[0]) | (part_P == shapes.MONKEY_EYES[1])
        light_P[eyes_P] *= 0.3
    color_P4 *= light_P[:, None]
    if texture.gloss:
        color_P4 += (200.0 * texture.gloss * _highlight(normal, to_light, layout.camera, cosine, sine))[:, None]
    return _words(np.clip(color_P4, 0.0, 255.0).astype(np.uint8))


def _normal(shape: str, point: list[np.ndarray], part_P: np.ndarray) -> list[np.ndarray]:
    """The surface's unit normal at local points, axis by axis."""
    if shape == "sphere":
        return point
    if shape == "cube":
        return [np.where(part_P == axis, np.sign(point[axis]), np.float32(0.0)) for axis in range(3)]
    if shape == "cylinder":
        top_P = (part_P == shapes.CYLINDER_TOP).astype(np.float32)
        return [point[0] * (1.0 - top_P), point[1] * (1.0 - top_P), top_P]
    centre_M3, half_M3 = (np.array(column, dtype=np.float32) for column in zip(*shapes.MONKEY, strict=True))
    slope = [(point[axis] - centre_M3[part_P, axis]) / (half_M3[part_P, axis] ** 2) for axis in range(3)]
    per_length_P = 1.0 / np.sqrt(slope[0] * slope[0] + slope[1] * slope[1] + slope[2] * slope[2])
    return [component * per_length_P for component in slope]


def _texture_places(
    shape: str, point: list[np.ndarray], normal: list[np.ndarray], part_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where on the texture a local point lies, in tiles: a cylinder is wrapped, all else is projected.

    Projected means along the axis that the surface faces most, so that nothing is stretched to more than 1.8.
    """
    x, y, z = point
    nx, ny, nz = (np.abs(component) for component in normal)
    if shape == "cylinder":
        top_P = part_P == shapes.CYLINDER_TOP
        return np.where(top_P, x, _around(x, y, nx, ny)), np.where(top_P, y, z)
    faces_z = nz >= np.maximum(nx, ny)
    faces_x = (nx >= ny) & ~faces_z
    return np.where(faces_x, y, x), np.where(faces_z, y, z)


def _around(x: np.ndarray, y: np.ndarray, along_x: np.ndarray, along_y: np.ndarray) -> np.ndarray:
    """How far round a circle a point lies, in [0, 6) or a little below 0: an arc tangent out of products.

    Six tiles for a circumference of 2 pi radii: a whole number, so that the texture closes without a seam.
    """
    swap_P = along_y > along_x
    sideways_P = np.where(swap_P, -x, y) / np.maximum(np.where(swap_P, along_y, along_x), np.float32(1e-6))
    ahead_P = np.where(np.where(swap_P, y, x) >= 0.0, np.float32(1.0), np.float32(-1.0))
    part_P = sideways_P * ahead_P
    quarter_P = swap_P.astype(np.float32) + (np.float32(1.0) - ahead_P)
    return 1.5 * (quarter_P + 0.5 * part_P * (1.2732395 - 0.2732395 * np.abs(part_P)))


def _highlight(normal: list[np.ndarray], to_light: Vector, camera: Camera, cosine: float, sine: float) -> np.ndarray:
    """The mirror's part of the lamp, for a viewer at the camera: the normal against the half vector, to the 16th."""
    back = _turned(camera.forward, cosine, sine)
    half = normalised((to_light[0] - back[0], to_light[1] - back[1], to_light[2] - back[2]))
    shine_P = np.maximum(normal[0] * half[0] + normal[1] * half[1] + normal[2] * half[2], 0.0)
    for _ in range(4):
        shine_P = shine_P * shine_P
    return shine_P


def _turned(vector: Vector, cosine: float, sine: float) -> Vector:
    """A direction of the world in the frame of an object that is turned by this angle."""
    return vector[0] * cosine + vector[1] * sine, vector[1] * cosine - vector[0] * sine, vector[2]


def _sizes(texture: Texture, texels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which size of the texture to use where a pixel spans so many texels: its side (float) and its start."""
    level = np.searchsorted(_LIMITS, texels)
    return _SIDES[level], np.array(texture.starts, dtype=np.int32)[level]


def _soften_edges(frame_HW: np.ndarray, mask_HW: np.ndarray) -> None:
    """Blend the pixels on both sides of an object's outline by a quarter, in place."""
    for axis in (0, 1):
        here, there = (frame_HW[:-1], frame_HW[1:]) if axis == 0 else (frame_HW[:, :-1], frame_HW[:, 1:])
        edge = np.nonzero(mask_HW[:-1] != mask_HW[1:] if axis == 0 else mask_HW[:, :-1] != mask_HW[:, 1:])
        one, other = here[edge], there[edge]
        middle = _mean(one, other)
        here[edge], there[edge] = _mean(one, middle), _mean(other, middle)


def _mean(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The mean of two colours, byte by byte inside their words, rounded down."""
    return (one & other) + (((one ^ other) & np.uint32(0xFEFEFEFE)) >> np.uint32(1))


def _bytes(words: np.ndarray) -> np.ndarray:
    return words.view(np.uint8).reshape(*words.shape, 4)


def _words(quads: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(quads).view(np.uint32).reshape(quads.shape[:-1])
