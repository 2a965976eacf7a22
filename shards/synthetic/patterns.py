"""The pattern families of the synthetic materials: arrays in [0, 1] that repeat seamlessly in both directions.

Each family maps (draws, cells) to how much of a material's first colour each texel has; `cells` is how often
the pattern repeats along a tile. Only sums, products, quotients and roots occur: these are exactly rounded
everywhere, unlike sines and powers, so that a texture is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shards.synthetic.draws import Draws

SIDE = 128  # texels along a tile

Pattern = Callable[[Draws, int], np.ndarray]


def value_noise(draws: Draws, rows: int, columns: int) -> np.ndarray:
    """Smooth noise on a lattice of rows x columns, in [0, 1]."""
    lattice_RC = draws.fractions((rows, columns))
    low_S, high_S, blend_S = _lattice_places(rows)
    across_SC = lattice_RC[low_S] * (1.0 - blend_S)[:, None] + lattice_RC[high_S] * blend_S[:, None]
    low_S, high_S, blend_S = _lattice_places(columns)
    return across_SC[:, low_S] * (1.0 - blend_S) + across_SC[:, high_S] * blend_S


def fractal(draws: Draws, cells: int) -> np.ndarray:
    """Noise at three scales, stretched to about the whole of [0, 1]."""
    noise_SS = (
        value_noise(draws, cells, cells) * 0.55
        + value_noise(draws, 2 * cells, 2 * cells) * 0.3
        + value_noise(draws, 4 * cells, 4 * cells) * 0.15
    )
    return _stretch(noise_SS, 0.2, 0.8)


def _noise(draws: Draws, cells: int) -> np.ndarray:
    return _stretch(fractal(draws, cells), 0.25, 0.75)


def _plain(draws: Draws, cells: int) -> np.ndarray:
    return 0.7 + 0.3 * fractal(draws, cells)


def _patches(draws: Draws, cells: int) -> np.ndarray:
    return _stretch(fractal(draws, cells), 0.45, 0.55)


def _veins(draws: Draws, cells: int) -> np.ndarray:
    ridge_SS = np.abs(fractal(draws, cells) - 0.5)
    return _stretch(ridge_SS, 0.0, 0.09) * (0.85 + 0.15 * value_noise(draws, 4, 4))


def _stripes(draws: Draws, cells: int) -> np.ndarray:
    u_S, v_S = _grid()
    bent_SS = u_S * cells + 0.45 * value_noise(draws, 3, 3) + 0.0 * v_S
    return _stretch(_triangle(bent_SS), 0.3, 0.7)


def _zigzag(draws: Draws, cells: int) -> np.ndarray:
    u_S, v_S = _grid()
    return _stretch(_triangle(v_S * cells + 0.5 * _triangle(u_S * cells)), 0.42, 0.58)


def _checks(draws: Draws, cells: int) -> np.ndarray:
    u_S, v_S = _grid()
    return (((u_S * cells).astype(np.int64) + (v_S * cells).astype(np.int64)) % 2).astype(np.float64)


def _diamonds(draws: Draws, cells: int) -> np.ndarray:
    u_S, v_S = _grid()
    return _stretch(0.5 * (_triangle(u_S * cells) + _triangle(v_S * cells)), 0.47, 0.53)


def _bricks(draws: Draws, cells: int) -> np.ndarray:
    """Rows of bricks, twice as wide as high, each row shifted by half a brick."""
    u_S, v_S = _grid()
    row_SS = (v_S * cells).astype(np.int64) + 0 * u_S.astype(np.int64)
    along_SS = u_S * (cells / 2) + 0.5 * (row_SS % 2)
    column_SS = along_SS.astype(np.int64) % max(cells // 2, 1)
    tint_SS = 0.7 + 0.3 * draws.fractions((cells, cells))[row_SS % cells, column_SS]
    mortar_SS = np.minimum(_edge(along_SS) * 2.0, _edge(v_S * cells))
    return _stretch(mortar_SS, 0.05, 0.12) * tint_SS


def _tiles(draws: Draws, cells: int) -> np.ndarray:
    u_S, v_S = _grid()
    tint_CC = 0.85 + 0.15 * draws.fractions((cells, cells))
    tint_SS = tint_CC[(v_S * cells).astype(np.int64), (u_S * cells).astype(np.int64)]
    return _stretch(np.minimum(_edge(u_S * cells), _edge(v_S * cells)), 0.05, 0.1) * tint_SS


def _planks(draws: Draws, cells: int) -> np.ndarray:
    """Boards along v, each of its own tone, with grain."""
    u_S, v_S = _grid()
    tone_S = 0.55 + 0.45 * draws.fractions((cells,))[(u_S * cells).astype(np.int64)]
    grain_SS = 0.75 + 0.25 * value_noise(draws, 4, 40)
    return _stretch(_edge(u_S * cells) + 0.0 * v_S, 0.02, 0.07) * tone_S * grain_SS


def _weave(draws: Draws, cells: int) -> np.ndarray:
    u_S, v_S = _grid()
    over_SS = ((u_S * cells).astype(np.int64) + (v_S * cells).astype(np.int64)) % 2 == 0
    return np.where(over_SS, 1.0, 0.6) * _stretch(
        np.where(over_SS, _edge(v_S * cells) + 0 * u_S, _edge(u_S * cells) + 0 * v_S), 0.0, 0.4
    )


def _dots(draws: Draws, cells: int) -> np.ndarray:
    return _stretch(_from_middle(cells, staggered=True), 0.28, 0.36)


def _rings(draws: Draws, cells: int) -> np.ndarray:
    return 1.0 - _stretch(np.abs(_from_middle(cells, staggered=True) - 0.36), 0.05, 0.14)


def _scales(draws: Draws, cells: int) -> np.ndarray:
    """Round roof tiles: bright at the middle of each, dark where it ends."""
    u_S, v_S = _grid()
    row_SS = (v_S * cells).astype(np.int64) + 0 * u_S.astype(np.int64)
    across_SS = _fraction(u_S * cells + 0.5 * (row_SS % 2)) - 0.5
    reach_SS = _fraction(v_S * cells) + 1.6 * across_SS * across_SS
    return 1.0 - _stretch(np.where(reach_SS > 1.0, reach_SS - 1.0, reach_SS), 0.35, 1.0)


def _hexagons(draws: Draws, cells: int) -> np.ndarray:
    rows, columns = np.divmod(np.arange(cells * cells), cells)
    nearest_SS, second_SS, _ = _cells_of((columns + 0.5 * (rows % 2)) / cells, (rows + 0.5) / cells)
    return _stretch((second_SS - nearest_SS) * cells, 0.08, 0.18)


def _cobbles(draws: Draws, cells: int) -> np.ndarray:
    nearest_SS, second_SS, owner_SS = _scattered(draws, cells)
    tint_SS = 0.6 + 0.4 * draws.fractions((cells * cells,))[owner_SS]
    return _stretch((second_SS - nearest_SS) * cells, 0.0, 0.3) * tint_SS


def _cracks(draws: Draws, cells: int) -> np.ndarray:
    nearest_SS, second_SS, _ = _scattered(draws, cells)
    return _stretch((second_SS - nearest_SS) * cells, 0.03, 0.1) * (0.85 + 0.15 * value_noise(draws, 16, 16))


def _gravel(draws: Draws, cells: int) -> np.ndarray:
    nearest_SS, _, owner_SS = _scattered(draws, cells)
    return (1.0 - _stretch(nearest_SS * cells, 0.25, 0.75)) * (draws.fractions((cells * cells,))[owner_SS] * 0.8 + 0.2)


PATTERNS: dict[str, Pattern] = {
    "bricks": _bricks,
    "checks": _checks,
    "cobbles": _cobbles,
    "cracks": _cracks,
    "diamonds": _diamonds,
    "dots": _dots,
    "gravel": _gravel,
    "hexagons": _hexagons,
    "noise": _noise,
    "patches": _patches,
    "plain": _plain,
    "planks": _planks,
    "rings": _rings,
    "scales": _scales,
    "stripes": _stripes,
    "tiles": _tiles,
    "veins": _veins,
    "weave": _weave,
    "zigzag": _zigzag,
}


def _lattice_places(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each texel along one side the lattice points before and after it, and how near the second is."""
    place_S = np.arange(SIDE) * (count / SIDE)
    low_S = place_S.astype(np.int64)
    part_S = place_S - low_S
    return low_S, (low_S + 1) % count, part_S * part_S * (3.0 - 2.0 * part_S)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """The texels' places in [0, 1): u as a row (1, SIDE), v as a column (SIDE, 1)."""
    place_S = (np.arange(SIDE) + 0.5) / SIDE
    return place_S[None, :], place_S[:, None]


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 at `low` and below, 1 at `high` and above, straight between them."""
    return np.clip((values - low) * (1.0 / (high - low)), 0.0, 1.0)


def _fraction(values: np.ndarray) -> np.ndarray:
    return values - np.floor(values)


def _triangle(values: np.ndarray) -> np.ndarray:
    """A wave of period one between 0 and 1."""
    return np.abs(2.0 * _fraction(values) - 1.0)


def _edge(values: np.ndarray) -> np.ndarray:
    """Distance to the nearest whole number, in [0, 0.5]."""
    return 0.5 - np.abs(_fraction(values) - 0.5)


def _from_middle(cells: int, staggered: bool) -> np.ndarray:
    """Distance from the middle of the texel's square cell; every other row is shifted where staggered."""
    u_S, v_S = _grid()
    row_SS = (v_S * cells).astype(np.int64) + 0 * u_S.astype(np.int64)
    across_SS = _fraction(u_S * cells + (0.5 * (row_SS % 2) if staggered else 0.0)) - 0.5
    down_SS = _fraction(v_S * cells) - 0.5
    return np.sqrt(across_SS * across_SS + down_SS * down_SS)


def _scattered(draws: Draws, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells around points scattered one to a square, so that they are of about equal size."""
    rows, columns = np.divmod(np.arange(cells * cells), cells)
    jitter_P2 = draws.fractions((cells * cells, 2))
    return _cells_of((columns + jitter_P2[:, 0]) / cells, (rows + jitter_P2[:, 1]) / cells)


def _cells_of(u_P: np.ndarray, v_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances to the nearest and the second nearest of the points, and which point is nearest."""
    u_S, v_S = _grid()
    nearest_SS = np.full((SIDE, SIDE), 9.0)
    second_SS = np.full((SIDE, SIDE), 9.0)
    owner_SS = np.zeros((SIDE, SIDE), dtype=np.int64)
    for point, (u, v) in enumerate(zip(u_P.tolist(), v_P.tolist(), strict=True)):
        across = np.abs(u_S - u % 1.0)
        down = np.abs(v_S - v % 1.0)
        across, down = np.minimum(across, 1.0 - across), np.minimum(down, 1.0 - down)  # the tile repeats
        distance_SS = across * across + down * down
        closer_SS = distance_SS < nearest_SS
        second_SS = np.where(closer_SS, nearest_SS, np.minimum(second_SS, distance_SS))
        nearest_SS = np.where(closer_SS, distance_SS, nearest_SS)
        owner_SS = np.where(closer_SS, point, owner_SS)
    return np.sqrt(nearest_SS), np.sqrt(second_SS), owner_SS
