"""The 60 materials of CLEVRTex v2's main set: their names, and procedural textures that stand in for them.

The published textures are scans that can't be shipped; these are told apart as well: no two share both colours
and pattern, and the mean colours are spread over hue and lightness, so that a material shows at 64x64 too.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

from shards.synthetic.draws import Draws
from shards.synthetic.patterns import PATTERNS, SIDE, fractal


@dataclass(frozen=True)
class Look:
    """How a material looks: a pattern of two colours (RRGGBB), its repeats along a tile, and its gloss."""

    first: str
    second: str
    pattern: str
    cells: int
    gloss: float = 0.0


LOOKS: dict[str, Look] = {
    "ambientcg_marble016": Look("e9a9b4", "8a3a55", "veins", 4, 0.5),
    "ambientcg_metal003": Look("8fa9c4", "5f7690", "plain", 8, 0.8),
    "ambientcg_tiles032": Look("12a5ad", "e6f4f2", "tiles", 4, 0.5),
    "ambientcg_tiles035": Look("f08a24", "fff0d8", "tiles", 3, 0.5),
    "cgbookcase_metalweave01_mr": Look("c9a227", "2e2308", "weave", 6, 0.6),
    "poly_haven_stony_dirt_path": Look("9c7a55", "3f2c1c", "gravel", 6),
    "polyhaven_aerial_asphalt_01": Look("4a5468", "2b313e", "noise", 8),
    "polyhaven_aerial_rocks_01": Look("8f9a5c", "3a4224", "cobbles", 4),
    "polyhaven_asphalt_02": Look("18181b", "6e6e74", "dots", 8),
    "polyhaven_bark_willow": Look("70683c", "1c1c0c", "stripes", 7),
    "polyhaven_blue_painted_planks": Look("2f7fe8", "0d2f70", "planks", 4),
    "polyhaven_brick_floor": Look("d2604a", "f0dcc8", "bricks", 6),
    "polyhaven_burned_ground_01": Look("1c1412", "ff6a14", "cracks", 4),
    "polyhaven_coast_sand_rocks_02": Look("f2dc98", "8c7440", "dots", 6),
    "polyhaven_concrete_floor": Look("c4c4be", "a2a29c", "noise", 4),
    "polyhaven_concrete_floor_painted": Look("3fbf5a", "dff0dc", "checks", 4, 0.3),
    "polyhaven_concrete_rock_path": Look("b8aee0", "544a80", "cobbles", 5),
    "polyhaven_coral_fort_wall_02": Look("ff9484", "fff0dc", "bricks", 4),
    "polyhaven_cracked_concrete_wall": Look("d4dde8", "2c3848", "cracks", 3),
    "polyhaven_dark_wood": Look("581424", "1c0408", "planks", 5, 0.3),
    "polyhaven_denim_fabric": Look("2438a0", "6c84e0", "weave", 10),
    "polyhaven_fabric_pattern_07": Look("d0208a", "ffd0ec", "zigzag", 5),
    "polyhaven_factory_brick": Look("701c34", "b88a90", "bricks", 8),
    "polyhaven_factory_wall": Look("f4e25c", "8c7a10", "tiles", 2),
    "polyhaven_floor_pattern_02": Look("f8f8f8", "101010", "diamonds", 4, 0.4),
    "polyhaven_forest_floor": Look("5c6a1c", "1f2408", "noise", 6),
    "polyhaven_forest_ground_04": Look("2a8a30", "0c3a14", "noise", 8),
    "polyhaven_forrest_ground_01": Look("86d83c", "2c5a14", "gravel", 7),
    "polyhaven_garage_floor": Look("8a74b0", "4a3c6c", "checks", 6),
    "polyhaven_grey_plaster": Look("929292", "7c7c7c", "plain", 6),
    "polyhaven_hexagonal_concrete_paving": Look("a4c8b4", "3c5c4c", "hexagons", 4),
    "polyhaven_kitchen_wood": Look("e8a858", "a86420", "stripes", 5, 0.3),
    "polyhaven_laminate_floor_02": Look("ffe8bc", "c09860", "planks", 6, 0.3),
    "polyhaven_large_sandstone_blocks": Look("d88c78", "703828", "bricks", 2),
    "polyhaven_leather_red_02": Look("e01c24", "780a10", "cobbles", 9, 0.5),
    "polyhaven_leaves_forest_ground": Look("e0c814", "5c4a04", "cobbles", 7),
    "polyhaven_medieval_blocks_02": Look("5c86a8", "1c3040", "bricks", 4),
    "polyhaven_old_sandstone_02": Look("e0946c", "f4d4b8", "stripes", 3),
    "polyhaven_plank_flooring_02": Look("a84c1c", "4c1c04", "planks", 3, 0.3),
    "polyhaven_preconcrete_wall_001": Look("6cb4cc", "2c6478", "tiles", 2),
    "polyhaven_raw_plank_wall": Look("c8a488", "7c5c44", "planks", 4),
    "polyhaven_red_sandstone_wall": Look("b82c14", "5c1004", "bricks", 6),
    "polyhaven_rocky_gravel": Look("b0b0b8", "242428", "gravel", 8),
    "polyhaven_roof_07": Look("9438a4", "340c40", "scales", 6),
    "polyhaven_rough_plaster_brick_02": Look("e4f4b4", "94ac5c", "bricks", 4),
    "polyhaven_rough_wood": Look("b4a458", "4c4418", "stripes", 9),
    "polyhaven_rusty_metal": Look("b0501c", "2c7c8c", "patches", 4, 0.2),
    "polyhaven_rusty_metal_02": Look("f4741c", "482010", "patches", 6, 0.2),
    "polyhaven_slab_tiles": Look("1c6c5c", "9cdcc4", "tiles", 4, 0.4),
    "polyhaven_snow_field_aerial": Look("fafcff", "c4dcf8", "noise", 3),
    "polyhaven_square_floor_patern_01": Look("54dcf8", "103c8c", "checks", 4, 0.3),
    "polyhaven_stone_wall": Look("5c5cc0", "24244c", "cobbles", 4),
    "polyhaven_weathered_brown_planks": Look("946070", "44282f", "planks", 7),
    "polyhaven_white_sandstone_blocks_02": Look("fff8e0", "c4b48c", "bricks", 2),
    "polyhaven_wood_floor_deck": Look("f4b020", "5c2404", "zigzag", 4),
    "polyhaven_wood_peeling_paint_weathered": Look("98ecc8", "98502c", "patches", 5),
    "polyhaven_wood_plank_wall": Look("1c9c64", "083c28", "planks", 5),
    "polyhaven_wood_planks_grey": Look("6c7c94", "303c4c", "planks", 4),
    "sharetextures_chainmail_1": Look("d4dce4", "14181c", "rings", 6, 0.6),
    "whitemarble": Look("ffffff", "8c94a4", "veins", 3, 0.6),
}
MATERIALS: tuple[str, ...] = tuple(sorted(LOOKS))


@dataclass(frozen=True)
class Texture:
    """A square tile at every halved size, so that a far surface is looked up among averages, without flicker.

    `texels` holds the sizes one after the other, row by row, each texel four bytes (red, green, blue, unused)
    in one word: a look-up fetches one word. Size k is SIDE >> k texels wide and begins at `starts[k]`.
    """

    texels: np.ndarray  # (sum of sides squared,) uint32
    starts: tuple[int, ...]
    gloss: float


@cache
def texture_of(name: str) -> Texture:
    """The texture of a material: a pure function of its name, made when it is first asked for."""
    look = LOOKS[name]
    draws = Draws(zlib.crc32(name.encode()), look.cells)
    blend_SS1 = PATTERNS[look.pattern](draws, look.cells)[..., None]
    tile_SS3 = _rgb(look.second) * (1.0 - blend_SS1) + _rgb(look.first) * blend_SS1
    tile_SS3 = np.rint(tile_SS3 * (0.88 + 0.12 * fractal(draws, 12)[..., None]))  # a little wear on all
    level_SS4 = np.concatenate([tile_SS3, np.full((SIDE, SIDE, 1), 255.0)], axis=2).astype(np.uint16)
    levels, starts, start = [], [], 0
    while True:
        levels.append(level_SS4.astype(np.uint8).reshape(-1, 4))
        starts.append(start)
        start += len(levels[-1])
        if len(level_SS4) == 1:
            break
        pairs = level_SS4[0::2] + level_SS4[1::2]
        level_SS4 = (pairs[:, 0::2] + pairs[:, 1::2] + 2) >> 2
    texels = np.ascontiguousarray(np.concatenate(levels)).view(np.uint32).reshape(-1)
    texels.setflags(write=False)
    return Texture(texels, tuple(starts), look.gloss)


def _rgb(code: str) -> np.ndarray:
    return np.array([int(code[at : at + 2], 16) for at in (0, 2, 4)], dtype=np.float64)
