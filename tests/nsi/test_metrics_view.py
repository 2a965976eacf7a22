"""The evaluation view: exact source pixels, one bilinear enlargement before the argmax."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from nsi.metrics.view import (
    OFFICIAL_VIEW,
    WHOLE_FRAME,
    View,
    peaks,
    segments,
    view_alphas,
    view_masks,
    view_segments,
)

FRAME = (240, 320)


def test_official_box_of_a_clevrtex_frame():
    box = OFFICIAL_VIEW.box(FRAME)
    assert (box.left * 320, box.top * 240, box.width * 320, box.height * 240) == (64, 24, 192, 192)
    assert OFFICIAL_VIEW.describe() == "official view at 128x128"


def test_official_masks_are_the_nearest_pixels_of_the_crop():
    ids = np.random.default_rng(0).integers(0, 11, FRAME).astype(np.uint8)
    seen = view_masks(ids)
    assert seen.dtype == np.uint8
    for i, j in ((0, 0), (1, 2), (127, 127), (64, 3)):
        assert seen[i, j] == ids[math.floor(24 + (i + 0.5) * 1.5), math.floor(64 + (j + 0.5) * 1.5)]
    crop = Image.fromarray(ids).crop((64, 24, 256, 216))
    assert (seen == np.asarray(crop.resize((128, 128), Image.Resampling.NEAREST))).all()


def test_whole_frame_masks_and_leading_axes():
    ids = np.random.default_rng(1).integers(0, 11, (3, *FRAME)).astype(np.uint8)
    seen = view_masks(ids, WHOLE_FRAME)
    assert seen.shape == (3, 128, 128)
    for one, many in zip(ids, seen, strict=True):
        assert (view_masks(one, WHOLE_FRAME) == many).all()
        assert (many == np.asarray(Image.fromarray(one).resize((128, 128), Image.Resampling.NEAREST))).all()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 30), st.sampled_from([None, Fraction(4, 5), Fraction(1)]))
def test_any_frame_takes_the_pixel_that_the_formula_names(height, width, size, crop):
    view = View("any", crop, size)
    if crop is not None and crop * height > width:
        with pytest.raises(ValueError, match="too narrow"):
            view.box((height, width))
        return
    ids = np.arange(height * width).reshape(height, width)
    seen = view_masks(ids, view)
    across, down = (width, height) if crop is None else (crop * height, crop * height)
    for i in range(size):
        row = math.floor((height - down) / Fraction(2) + (i + Fraction(1, 2)) * down / size)
        column = math.floor((width - across) / Fraction(2) + (i + Fraction(1, 2)) * across / size)
        assert seen[i, i] == row * width + column


def test_a_view_of_the_frames_own_size_changes_nothing():
    ids = np.arange(12 * 16).reshape(12, 16)
    assert (view_masks(ids, View("crop", Fraction(1), 12)) == ids[:, 2:14]).all()


@pytest.mark.parametrize(("crop", "size"), [(Fraction(0), 8), (Fraction(6, 5), 8), (None, 0)])
def test_impossible_views_are_refused(crop, size):
    with pytest.raises(ValueError, match="no such view"):
        View("bad", crop, size)


def test_whole_frame_enlargement_is_torchs_bilinear():
    alphas = torch.rand(2, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    wanted = functional.interpolate(alphas.double(), size=(128, 128), mode="bilinear", align_corners=False)
    torch.testing.assert_close(view_alphas(alphas, FRAME, WHOLE_FRAME), wanted)


def bilinear_by_hand(grid, y, x):
    """The value at fractions y, x of the frame, cell centres at (r + 0.5) / G, the border's value beyond them."""
    rows, columns = grid.shape
    y, x = min(max(y * rows - 0.5, 0), rows - 1), min(max(x * columns - 0.5, 0), columns - 1)
    r, c = min(int(y), rows - 2), min(int(x), columns - 2)
    v, u = y - r, x - c
    top = grid[r, c] * (1 - u) + grid[r, c + 1] * u
    return top * (1 - v) + (grid[r + 1, c] * (1 - u) + grid[r + 1, c + 1] * u) * v


def test_official_alphas_and_segments_by_hand():
    alphas = torch.rand(4, 6, 9, generator=torch.Generator().manual_seed(2))
    view = View("small", Fraction(4, 5), 16)
    seen, winners = view_alphas(alphas, FRAME, view), view_segments(alphas, FRAME, view)
    for i in range(16):
        for j in range(16):
            y, x = (24 + (i + 0.5) * 12) / 240, (64 + (j + 0.5) * 12) / 320
            by_hand = [bilinear_by_hand(grid, y, x) for grid in alphas.double().numpy()]
            np.testing.assert_allclose(seen[:, i, j], by_hand, atol=1e-12)
            assert winners[i, j] == int(np.argmax(by_hand))


def test_masks_and_segments_share_their_geometry():
    ids = np.zeros(FRAME, np.uint8)
    ids[60:180, 80:240] = 1  # cell borders of a 4 x 4 grid: the middle half of the frame
    inside = torch.zeros(4, 4)
    inside[1:3, 1:3] = 1
    for view in (OFFICIAL_VIEW, WHOLE_FRAME):
        seen = view_segments(torch.stack((1 - inside, inside)), FRAME, view)
        wrong = float((seen.numpy() != view_masks(ids, view)).mean())
        assert wrong < 0.05  # bilinear rounds the corners, and moves nothing


def test_batches_are_images_one_by_one_and_ties_go_to_the_lowest_slot():
    alphas = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    alphas[:, 2] = alphas[:, 1]  # twins: slot 2 never wins
    many = view_segments(alphas, FRAME)
    assert many.dtype == torch.int64
    assert not (many == 2).any()
    for one, seen in zip(alphas, many, strict=True):
        assert (view_segments(one, FRAME) == seen).all()
    assert (view_segments(torch.ones(4, 5, 5), FRAME) == 0).all()
    with pytest.raises(ValueError, match="alphas must be"):
        view_segments(torch.ones(5, 5), FRAME)


def test_the_argmax_comes_after_the_enlargement():
    # Slot 0 wins the left cell by a little, slot 1 the right one by far: the border moves left of the middle.
    alphas = torch.tensor([[[0.55, 0.0]], [[0.45, 1.0]]])
    assert float((view_segments(alphas, FRAME, WHOLE_FRAME) == 0).double().mean()) < 0.3


def test_segments_and_peaks_of_enlarged_alphas():
    alphas = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    seen = view_alphas(alphas, FRAME)
    assert (segments(seen) == view_segments(alphas, FRAME)).all()
    spots = peaks(seen)
    assert spots.shape == (2, 3)
    row, column = divmod(int(spots[1, 2]), 128)
    assert seen[1, 2, row, column] == seen[1, 2].max()
    assert (peaks(torch.ones(2, 4, 4)) == 0).all()
