"""What stands where in a synthetic scene: sampling by CLEVRTex's rules, and the JSON that describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shards.synthetic.camera import Camera, Vector, dot, normalised, sample_camera, subtract
from shards.synthetic.draws import Draws
from shards.synthetic.materials import MATERIALS

SHAPES = ("cube", "cylinder", "sphere", "monkey")
RADIUS = {"small": 0.4, "medium": 0.6, "large": 0.9}  # metres
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
FEWEST, MOST = 3, 10  # objects in a scene
REACH = 3.0  # x and y lie in [-REACH, REACH]
GAP = 0.1  # metres of ground left free between two objects' circles
# Two objects differ by this much along both of the camera's ground directions, as in CLEVR, so that each of
# them is clearly left or right of, in front of or behind the other (a relation asks for 0.2).
MARGIN, RELATION_THRESHOLD = 0.4, 0.2
TRIES = 150  # places tried for one object before the whole scene is begun again
_CUBE = 0.7071067811865476  # a cube's half edge for one unit of radius: its circle on the ground stays inside
RELATIONS = ("behind", "front", "left", "right")


@dataclass(frozen=True)
class Thing:
    """One object, as its JSON tells it."""

    shape: str
    size: str
    material: str
    color: str
    rotation: float  # degrees about the vertical axis
    x: float
    y: float

    @property
    def half(self) -> float:
        """Half the height in metres, and so the height of the centre: the object stands on the ground."""
        radius = RADIUS[self.size]
        return radius * _CUBE if self.shape == "cube" else radius

    @property
    def centre(self) -> Vector:
        """The middle of the object."""
        return self.x, self.y, round(self.half, 6)


@dataclass(frozen=True)
class Layout:
    """A scene before it is drawn. `light` is the unit direction from the ground towards the light."""

    camera: Camera
    light: Vector
    ground: str
    things: tuple[Thing, ...]


def sample_frame(draws: Draws, size: tuple[int, int]) -> tuple[Layout, int]:
    """A scene without its objects, and how many objects it shall have.

    The number is drawn once and kept through every repeated attempt: crowded scenes fail more often, and a new
    number with each attempt would make them rarer than the rules say.
    """
    camera = sample_camera(draws, size)
    ways = camera.directions()
    left, front = ways["left"], ways["front"]
    to_left, to_front = draws.uniform(0.35, 0.85), draws.uniform(0.15, 0.55)
    light = normalised((left[0] * to_left + front[0] * to_front, left[1] * to_left + front[1] * to_front, 1.0))
    ground = draws.choice(MATERIALS)
    return Layout(camera, light, ground, ()), FEWEST + draws.below(MOST - FEWEST + 1)


def sample_things(draws: Draws, camera: Camera, count: int) -> tuple[Thing, ...] | None:
    """`count` objects that keep their distances, or None where no place was left for one of them."""
    ways = camera.directions()
    (left_x, left_y, _), (front_x, front_y, _) = ways["left"], ways["front"]
    things: list[Thing] = []
    places: list[tuple[float, float, float, float, float]] = []  # x, y, radius, leftness, frontness
    for _ in range(count):
        size = draws.choice(tuple(RADIUS))
        radius = RADIUS[size]
        for _ in range(TRIES):
            x, y = REACH * (2.0 * draws.fraction() - 1.0), REACH * (2.0 * draws.fraction() - 1.0)
            leftness, frontness = x * left_x + y * left_y, x * front_x + y * front_y
            for other_x, other_y, other_radius, other_leftness, other_frontness in places:
                if abs(leftness - other_leftness) < MARGIN or abs(frontness - other_frontness) < MARGIN:
                    break
                if (x - other_x) ** 2 + (y - other_y) ** 2 < (radius + other_radius + GAP) ** 2:
                    break
            else:
                break
        else:
            return None
        places.append((x, y, radius, leftness, frontness))
        rotation = round(draws.uniform(0.0, 360.0), 6)
        things.append(
            Thing(
                draws.choice(SHAPES),
                size,
                draws.choice(MATERIALS),
                draws.choice(COLORS),
                rotation,
                round(x, 6),
                round(y, 6),
            )
        )
    return tuple(things)


def describe(layout: Layout, name: str, index: int) -> dict[str, object]:
    """The scene's JSON, with the keys and types of CLEVRTex v2."""
    directions = layout.camera.directions()
    centres = [thing.centre for thing in layout.things]
    return {
        "num_objects": len(layout.things),
        "split": "full",
        "image_index": index,
        "image_filename": f"{name}_",
        "ground_material": layout.ground,
        "directions": {way: list(vector) for way, vector in directions.items()},
        "objects": [_describe_thing(thing, place, layout.camera) for place, thing in enumerate(layout.things, 1)],
        "relationships": {way: _related(centres, directions[way]) for way in RELATIONS},
        "mask_filename": f"{name}_flat",
    }


def _describe_thing(thing: Thing, place: int, camera: Camera) -> dict[str, object]:
    x, y, depth = camera.project(thing.centre)
    return {
        "shape": thing.shape,
        "rotation": thing.rotation,
        "size": thing.size,
        "3d_coords": list(thing.centre),
        "pixel_coords": [round(x), round(y), round(depth, 6)],
        "index": place,
        "color": thing.color,
        "material": thing.material,
    }


def _related(centres: Sequence[Vector], way: Vector) -> list[list[int]]:
    """For each object the others that lie in this direction from it, by their places in the list."""
    return [
        [
            other
            for other, there in enumerate(centres)
            if other != one and dot(subtract(there, here), way) > RELATION_THRESHOLD
        ]
        for one, here in enumerate(centres)
    ]
