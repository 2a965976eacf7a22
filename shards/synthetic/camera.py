"""The camera of a synthetic scene: CLEVR's position and lens, moved a little from scene to scene.

A pixel's ray is `position + depth * (forward + x * right + y * up)`, so a ray's parameter is the depth along
the optical axis, which is also the third number of CLEVRTex's `pixel_coords`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shards.synthetic.draws import Draws

Vector = tuple[float, float, float]

# Fitted to rendered CLEVRTex scenes (0.2 pixels off at most): a 35 mm lens on a 32 mm sensor, the whole camera
# shifted by up to half a metre along each axis, always turned towards the origin.
HOME: Vector = (7.4811, -6.5076, 5.3437)
JITTER = 0.5
FOCAL_AT_320 = 350.0
_DIGITS = 9  # sines and roots are rounded to this, so that two maths libraries can't differ in the last bit


@dataclass(frozen=True)
class Camera:
    """Where the camera stands, its three unit axes, its focal length in pixels and the size of its frame."""

    position: Vector
    forward: Vector
    right: Vector
    up: Vector
    focal: float
    width: int
    height: int

    def project(self, point: Vector) -> Vector:
        """The point's place in the frame in pixels from the top left corner, and its depth."""
        offset = subtract(point, self.position)
        depth = dot(offset, self.forward)
        return (
            self.width / 2 + self.focal * dot(offset, self.right) / depth,
            self.height / 2 - self.focal * dot(offset, self.up) / depth,
            depth,
        )

    def directions(self) -> dict[str, Vector]:
        """The six directions that CLEVR's relations speak of: the camera's, laid down on the ground."""
        behind = normalised((self.forward[0], self.forward[1], 0.0))
        right = normalised((self.right[0], self.right[1], 0.0))
        return {
            "behind": behind,
            "front": negated(behind),
            "left": negated(right),
            "right": right,
            "above": (0.0, 0.0, 1.0),
            "below": (0.0, 0.0, -1.0),
        }

    def scale(self) -> float:
        """How large things appear here, against CLEVRTex's 320x240 frame."""
        return self.focal / FOCAL_AT_320


def sample_camera(draws: Draws, size: tuple[int, int]) -> Camera:
    """CLEVR's camera, moved by its jitter, for a frame of (width, height) pixels."""
    width, height = size
    x, y, z = (round(home + draws.uniform(-JITTER, JITTER), _DIGITS) for home in HOME)
    forward = normalised((-x, -y, -z))
    right = normalised((forward[1], -forward[0], 0.0))  # forward x (0, 0, 1): no roll
    up = (
        right[1] * forward[2] - right[2] * forward[1],
        right[2] * forward[0] - right[0] * forward[2],
        right[0] * forward[1] - right[1] * forward[0],
    )
    # A frame that is wider or taller than 4:3 shows more beside CLEVR's view, never less of it.
    focal = FOCAL_AT_320 * min(width / 320, height / 240)
    return Camera((x, y, z), forward, right, up, focal, width, height)


def rotation_of(degrees: float) -> tuple[float, float]:
    """Cosine and sine of a turn about the vertical axis."""
    return round(math.cos(math.radians(degrees)), _DIGITS), round(math.sin(math.radians(degrees)), _DIGITS)


def dot(a: Vector, b: Vector) -> float:
    """The scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def subtract(a: Vector, b: Vector) -> Vector:
    """a - b."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def negated(a: Vector) -> Vector:
    """-a, without a negative zero, which JSON would show."""
    return 0.0 - a[0], 0.0 - a[1], 0.0 - a[2]


def normalised(a: Vector) -> Vector:
    """a at length one."""
    length = math.sqrt(dot(a, a))
    return round(a[0] / length, _DIGITS), round(a[1] / length, _DIGITS), round(a[2] / length, _DIGITS)
