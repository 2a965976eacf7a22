"""Which object a pixel sees, and how far away: rays against spheres, cylinders, cubes and monkeys.

Every shape is met in its own frame: the object's centre is the origin, its half height is the unit, its
rotation is undone. There the ray of pixel (row i, column j) is `o + t * d` with
`d = forward + x[j] * right + y[i] * up`, and t is still the camera's depth, so that depths of different
objects compare. Legend: H, W frame; h, w the box around one object; P visible pixels of one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.synthetic.camera import Camera, Vector, dot, rotation_of, subtract
from shards.synthetic.layout import Layout, Thing

# A monkey is a union of ellipsoids (centre, half axes) in its own frame; it looks along -y, as Blender's does.
MONKEY: tuple[tuple[Vector, Vector], ...] = (
    ((0.0, 0.12, 0.2), (0.72, 0.74, 0.72)),  # head
    ((0.0, -0.38, -0.4), (0.46, 0.5, 0.42)),  # muzzle
    ((0.98, 0.2, 0.22), (0.36, 0.16, 0.4)),  # ears
    ((-0.98, 0.2, 0.22), (0.36, 0.16, 0.4)),
    ((0.29, -0.5, 0.3), (0.2, 0.16, 0.23)),  # eyes
    ((-0.29, -0.5, 0.3), (0.2, 0.16, 0.23)),
    ((0.0, 0.25, -0.6), (0.5, 0.46, 0.4)),  # the chin and neck that it stands on
)
MONKEY_EYES = (4, 5)  # their places in the list above
CYLINDER_SIDE, CYLINDER_TOP = 0, 1  # parts of a cylinder; a cube's part is the axis (0, 1, 2) of the face
_REACH: dict[str, Vector] = {  # half the box that holds each shape in its own frame
    "cube": (1.0, 1.0, 1.0),
    "cylinder": (1.0, 1.0, 1.0),
    "sphere": (1.0, 1.0, 1.0),
    "monkey": (1.35, 0.9, 1.0),
}
_NEVER = np.float32(1e9)  # the depth of what a ray does not meet


@dataclass(frozen=True)
class LocalRays:
    """The camera as seen from an object: the rays' origin and the camera's axes in the object's frame."""

    origin: Vector
    forward: Vector
    right: Vector
    up: Vector

    def directions(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rays' directions, axis by axis, for screen places x and y that broadcast together."""
        dx, dy, dz = (
            (f + x * np.float32(r)) + y * np.float32(u)
            for f, r, u in zip(self.forward, self.right, self.up, strict=True)
        )
        return dx, dy, dz


@dataclass(frozen=True)
class Raster:
    """What each pixel sees: the object's index (0 is the ground), its depth, and which part of its shape."""

    mask_HW: np.ndarray  # uint8
    depth_HW: np.ndarray  # float32
    part_HW: np.ndarray  # uint8
    boxes: tuple[tuple[slice, slice], ...]  # for each object the part of the frame that holds it


def screen_axes(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels' middles lie on the plane at depth one: x for the columns (W,), y for the rows (H,)."""
    x_W = (np.arange(camera.width) + 0.5 - camera.width / 2) / camera.focal
    y_H = (camera.height / 2 - 0.5 - np.arange(camera.height)) / camera.focal
    return x_W.astype(np.float32), y_H.astype(np.float32)


def local_rays(thing: Thing, camera: Camera) -> LocalRays:
    """The camera in the frame of an object."""
    cosine, sine = rotation_of(thing.rotation)
    unit = 1.0 / thing.half

    def into(vector: Vector) -> Vector:
        x, y, z = vector
        return (x * cosine + y * sine) * unit, (y * cosine - x * sine) * unit, z * unit

    return LocalRays(
        into(subtract(camera.position, thing.centre)), into(camera.forward), into(camera.right), into(camera.up)
    )


def rasterise(layout: Layout) -> Raster:
    """Draw all objects into one depth buffer."""
    camera = layout.camera
    x_W, y_H = screen_axes(camera)
    shape = (camera.height, camera.width)
    mask_HW, part_HW = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
    depth_HW = np.full(shape, _NEVER, dtype=np.float32)
    boxes = []
    with np.errstate(divide="ignore"):  # a ray along a cube's face has a zero, and its infinity is right
        for index, thing in enumerate(layout.things, 1):
            rays = local_rays(thing, camera)
            box = rows, columns = _box(thing, rays, camera)
            boxes.append(box)
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            directions = rays.directions(x_W[None, columns], y_H[rows, None])
            depth_hw, part_hw = _meet(thing.shape, rays.origin, directions)
            nearer_hw = depth_hw < depth_HW[box]
            np.copyto(depth_HW[box], depth_hw, where=nearer_hw)
            np.copyto(part_HW[box], part_hw, where=nearer_hw)
            mask_HW[box][nearer_hw] = index
    return Raster(mask_HW, depth_HW, part_HW, tuple(boxes))


def _box(thing: Thing, rays: LocalRays, camera: Camera) -> tuple[slice, slice]:
    """The rows and columns of the frame that can see the object: the corners of its box, projected."""
    reach = _REACH[thing.shape]
    unit = thing.half * thing.half  # the local axes carry 1 / half each: this makes a local product metric
    xs, ys = [], []
    for corner in [(sx, sy, sz) for sx in (-1, 1) for sy in (-1, 1) for sz in (-1, 1)]:
        point = corner[0] * reach[0], corner[1] * reach[1], corner[2] * reach[2]
        offset = subtract(point, rays.origin)
        depth = max(dot(offset, rays.forward) * unit, 0.1)
        xs.append(camera.width / 2 + camera.focal * dot(offset, rays.right) * unit / depth)
        ys.append(camera.height / 2 - camera.focal * dot(offset, rays.up) * unit / depth)
    return _span(min(ys), max(ys), camera.height), _span(min(xs), max(xs), camera.width)


def _span(low: float, high: float, length: int) -> slice:
    """The pixels between two places, inside a frame of this length."""
    return slice(min(max(int(low) - 1, 0), length), max(min(int(high) + 2, length), 0))


def _meet(shape: str, origin: Vector, directions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | int]:
    """Depth (h, w) at which each ray meets the shape (or _NEVER), and the part of the shape that it meets."""
    if shape == "sphere":
        return _meet_ellipsoid(origin, directions), 0
    if shape == "cube":
        return _meet_cube(origin, directions)
    if shape == "cylinder":
        return _meet_cylinder(origin, directions)
    return _meet_monkey(origin, directions)


def _meet_ellipsoid(
    origin: Vector, directions: Sequence[np.ndarray], centre: Vector = (0.0, 0.0, 0.0), half: Vector = (1.0, 1.0, 1.0)
) -> np.ndarray:
    ox, oy, oz = ((o - c) / s for o, c, s in zip(origin, centre, half, strict=True))
    dx, dy, dz = (d if s == 1.0 else d * (1.0 / s) for d, s in zip(directions, half, strict=True))
    a_hw = dx * dx + dy * dy + dz * dz
    b_hw = dx * ox + dy * oy + dz * oz
    inside_hw = b_hw * b_hw - a_hw * (ox * ox + oy * oy + oz * oz - 1.0)
    depth_hw = (-b_hw - np.sqrt(np.maximum(inside_hw, 0.0))) / a_hw
    return np.where(inside_hw > 0.0, depth_hw, _NEVER)


def _meet_cube(origin: Vector, directions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A cube is where three slabs overlap: a ray is inside from the last entry to the first exit."""
    entries, exits = [], []
    for o, d in zip(origin, directions, strict=True):
        per_d = 1.0 / d
        one, other = (-1.0 - o) * per_d, (1.0 - o) * per_d
        entries.append(np.minimum(one, other))
        exits.append(np.maximum(one, other))
    enter_hw = np.maximum(np.maximum(entries[0], entries[1]), entries[2])
    leave_hw = np.minimum(np.minimum(exits[0], exits[1]), exits[2])
    axis_hw = np.where(entries[2] == enter_hw, np.uint8(2), (entries[1] == enter_hw).astype(np.uint8))
    return np.where(enter_hw < leave_hw, enter_hw, _NEVER), axis_hw


def _meet_cylinder(origin: Vector, directions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A round wall and a slab between two discs; the camera is always above the upper one."""
    (ox, oy, oz), (dx, dy, dz) = origin, directions
    a_hw = dx * dx + dy * dy
    b_hw = dx * ox + dy * oy
    inside_hw = b_hw * b_hw - a_hw * (ox * ox + oy * oy - 1.0)
    root_hw = np.sqrt(np.maximum(inside_hw, 0.0))
    per_a, per_dz = 1.0 / a_hw, 1.0 / dz
    wall_in, wall_out = (-b_hw - root_hw) * per_a, (root_hw - b_hw) * per_a
    one, other = (1.0 - oz) * per_dz, (-1.0 - oz) * per_dz
    discs_in, discs_out = np.minimum(one, other), np.maximum(one, other)
    enter_hw = np.maximum(wall_in, discs_in)
    met_hw = (inside_hw > 0.0) & (enter_hw < np.minimum(wall_out, discs_out))
    part_hw = (discs_in > wall_in).astype(np.uint8) * np.uint8(CYLINDER_TOP)
    return np.where(met_hw, enter_hw, _NEVER), part_hw


def _meet_monkey(origin: Vector, directions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    depth_hw = _meet_ellipsoid(origin, directions, *MONKEY[0])
    part_hw = np.zeros(depth_hw.shape, dtype=np.uint8)
    for part, (centre, half) in enumerate(MONKEY[1:], 1):
        here_hw = _meet_ellipsoid(origin, directions, centre, half)
        nearer_hw = here_hw < depth_hw
        depth_hw = np.minimum(depth_hw, here_hw)
        part_hw[nearer_hw] = part
    return depth_hw, part_hw
