"""The report's pictures, all SVG that stands in the page: curves by matplotlib, and slots as shapes over a photo.

Colours are written as CSS variables, so the page's light, dark and printed schemes each give their own.
Legend: H, W pixels of a frame.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Role = Literal["train", "validation", "other"]

# Distinct at a glance beside one another, on photos, in either scheme; slots beyond them begin anew, half as bright.
SLOT_COLOURS = (
    "#e6194b", "#3cb44b", "#4363d8", "#ffb000", "#911eb4", "#2ec4d6", "#f032e6", "#a3d80d",
    "#ff7849", "#008080", "#c49bff", "#9a6324", "#ffe14d", "#7a1f2b", "#7fe3b0", "#7d8a1c",
)  # fmt: skip
# What matplotlib draws in, and the page's variable that takes its place. No two are alike, none is a usual colour.
_PAINTS = {
    "train": ("#010101", "var(--train)"),
    "validation": ("#010102", "var(--validation)"),
    "other": ("#010103", "var(--other)"),
    "ink": ("#010104", "var(--muted)"),
    "grid": ("#010105", "var(--rule)"),
    "chance": ("#010106", "var(--chance)"),
}
SMALLEST_SHARE = 0.002  # of the frame: a smaller segment is painted but gets no number
_SMOOTH_FROM = 80  # points from which on a noisy curve is smoothed


@dataclass(frozen=True)
class Series:
    """One curve. Points that are None or not finite leave a gap."""

    role: Role
    steps: Sequence[float]
    values: Sequence[float | None]
    dots: bool = False
    noisy: bool = True  # drawn faint with its running median over it, where there are many points


@dataclass(frozen=True)
class SlotShape:
    """What one slot holds of a frame: its outline as an SVG path (even-odd), a place deep inside it, its share."""

    slot: int
    path: str
    x: float
    y: float
    share: float


def slot_colour(slot: int) -> str:
    """The colour of a slot, the same in every picture and list."""
    lap, place = divmod(slot, len(SLOT_COLOURS))
    channels = [int(SLOT_COLOURS[place][i : i + 2], 16) // (1 + lap % 2) for i in (1, 3, 5)]
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def text_colour(background: str) -> str:
    """Black or white, whichever is read better on a colour (relative luminance of WCAG 2)."""
    parts = [int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#ffffff"


def slot_shapes(segments_HW: np.ndarray) -> list[SlotShape]:
    """The shape of every slot that wins a pixel, the largest first. Pixel (row r, column c) spans c..c+1, r..r+1."""
    shapes = []
    for slot, count in zip(*np.unique(segments_HW, return_counts=True), strict=True):
        inside_HW = segments_HW == slot
        x, y = _deepest(inside_HW)
        shapes.append(SlotShape(int(slot), outline(inside_HW), x, y, float(count / segments_HW.size)))
    return sorted(shapes, key=lambda shape: -shape.share)


def outline(inside_HW: np.ndarray) -> str:
    """The border of a region as an SVG path, to be filled even-odd; empty for an empty region."""
    from matplotlib.figure import Figure

    if not inside_HW.any():
        return ""
    padded = np.pad(inside_HW.astype(np.float64), 1)  # so that loops close at the frame's edge
    rows, columns = (np.arange(side) - 0.5 for side in padded.shape)
    contours = Figure().add_subplot().contour(columns, rows, padded, levels=[0.5])
    loops = [np.asarray(loop) for path in contours.get_paths() for loop in path.to_polygons(closed_only=False)]
    return "".join(_loop(loop_P2) for loop_P2 in loops if len(loop_P2) > 2)


def chart(
    name: str,
    series: Sequence[Series],
    level: tuple[float, str] | None = None,
    marks: Sequence[float] = (),
    size: tuple[float, float] = (3.9, 2.4),
    percent: bool = False,
) -> str:
    """Curves over the training step as SVG text to be put into a page; `name` keeps its ids apart from others'.

    level: a horizontal line and what it says. marks: steps with a thin upright line. Without a finite point: "".
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    curves = [(each, *_finite(each)) for each in series]
    curves = [(each, steps, values) for each, steps, values in curves if np.isfinite(values).any()]
    if not curves:
        return ""
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5, "axes.linewidth": 0.8}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        ink, grid = _PAINTS["ink"][0], _PAINTS["grid"][0]
        for step in marks:
            axes.axvline(step, color=_PAINTS["ink"][0], linewidth=0.8, linestyle=(0, (1, 2.5)))
        for each, steps, values in curves:
            _draw(axes, each, steps, values)
        low, high = _limits([values for _, _, values in curves], level)
        axes.set_ylim(low, high)
        axes.margins(x=0.015)
        if level is not None:
            chance = _PAINTS["chance"][0]
            axes.axhline(level[0], color=chance, linewidth=1.3, linestyle=(0, (5, 3)))
            below = level[0] > (low + high) / 2
            axes.annotate(
                level[1], (1, level[0]), (-2, -4 if below else 4), ("axes fraction", "data"), "offset points",
                color=chance, ha="right", va="top" if below else "bottom",
            )  # fmt: skip
        axes.grid(axis="y", color=grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=ink, length=0, pad=4)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{100 * value:g} %" if percent else short_number(value))
        )
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(grid)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_page(file.getvalue(), name)


def photo(image_HW3: np.ndarray) -> str:
    """A frame as a data URL. JPEG: a fifth of the PNG's bytes, and nobody measures on it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HW3)).save(file, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def short_number(value: float) -> str:
    """A number in few characters: 20k, 2.4e-4, 0.25."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e3:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        return re.sub(r"(\.0)?e-0*", "e-", f"{value:.1e}")
    return f"{value:.4g}"


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([math.nan if value is None else float(value) for value in series.values], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return np.asarray(series.steps, dtype=np.float64), values


def _draw(axes, series: Series, steps: np.ndarray, values: np.ndarray) -> None:
    colour = _PAINTS[series.role][0]
    many = series.noisy and len(values) >= _SMOOTH_FROM
    markers = {"marker": "o", "markersize": 4, "markeredgewidth": 0} if series.dots or len(values) < 3 else {}
    if markers and len(values) > 40:
        markers["markersize"] = 2
    axes.plot(steps, values, color=colour, linewidth=1 if many else 1.8, alpha=0.35 if many else 1, **markers)
    if many:
        axes.plot(steps, _running_median(values, len(values) // 60 + 1), color=colour, linewidth=1.8)


def _running_median(values: np.ndarray, reach: int) -> np.ndarray:
    """Median of the points up to `reach` to either side (fewer at the ends). A jump stays one; gaps stay gaps."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, reach, constant_values=np.nan), 2 * reach + 1)
    median = np.full(len(values), np.nan)
    known = np.isfinite(values)
    median[known] = np.nanmedian(windows[known], axis=1)
    return median


def _limits(curves: Sequence[np.ndarray], level: tuple[float, str] | None) -> tuple[float, float]:
    """From zero where nothing is below it, up to nearly all points: the first steps' peaks may leave the picture."""
    values = np.concatenate([values[np.isfinite(values)] for values in curves])
    top = float(np.quantile(values, 0.99)) if len(values) > 50 else float(values.max())
    top = max(top, level[0]) if level is not None else top
    low = min(0.0, float(values.min()))
    return low, low + ((top - low) * 1.08 or 1.0)


def _deepest(inside_HW: np.ndarray) -> tuple[float, float]:
    """The middle of the pixel that is farthest from the region's border: unlike a centroid it is always inside."""
    from scipy.ndimage import distance_transform_edt

    depth_HW = np.asarray(distance_transform_edt(np.pad(inside_HW, 1)))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth_HW.argmax()), depth_HW.shape)
    return float(column) + 0.5, float(row) + 0.5


def _loop(points_P2: np.ndarray) -> str:
    if np.array_equal(points_P2[0], points_P2[-1]):
        points_P2 = points_P2[:-1]
    before, after = points_P2 - np.roll(points_P2, 1, axis=0), np.roll(points_P2, -1, axis=0) - points_P2
    bends = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]  # points on a straight line say nothing
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points_P2[bends]) + "Z"


def _for_page(svg: str, name: str) -> str:
    """A file's SVG made part of a page: no header, own ids, the page's fonts and colours, as wide as it may be."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # its style would be the whole page's
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1))
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for colour, variable in _PAINTS.values():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", '<svg aria-hidden="true"', 1)
