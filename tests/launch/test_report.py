"""The report: one file that stands alone, the right figures in it, and shapes that lie where they should."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from launch.config import LossConfig, TrainConfig, to_json
from launch.report import ReportConfig, count, render, run, share, spread
from launch.reporting.figures import (
    SLOT_COLOURS,
    Series,
    chart,
    outline,
    short_number,
    slot_colour,
    slot_shapes,
    text_colour,
)
from launch.runfolder import METRICS, eval_path, read_lines, scenes_path, standing_lines
from nsi.errors import UserError

VOID = ("meta", "img", "input", "br", "link")


class Page(HTMLParser):
    """Checks that tags nest, and keeps every tag, address and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"{tag} was never opened"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


def _write_run(folder: Path, evaluated: bool = True, dims: int = 3) -> Path:
    folder.mkdir()
    config = TrainConfig(Path("shards"), folder, loss=LossConfig(tau=0.37))
    recorded = {
        "config": to_json(config),
        "data": {"fingerprint": "feed" * 16, "variant": "full", "split_rule": "official", "train": 4321, "test": 200},
        "vocabulary": {"sizes": ["large"], "shapes": ["cube"], "materials": ["a", "b"]},
        "backbone": {"name": "dct", "hash": "beef", "feature_dim": 43, "grid": [8, 8]},
        "parameters": 123456,
        "versions": {"torch": "2.9", "deepspeed": "0.18"},
    }
    (folder / "config.json").write_text(json.dumps(recorded))
    (folder / "attempts").mkdir()
    for number, restored in ((1, 0), (2, 20)):
        attempt = {"number": number, "started": 1.7e9, "world_size": 4 // number, "launcher": "slurm"}
        (folder / f"attempts/attempt-{number:04d}.json").write_text(json.dumps({**attempt, "restored_step": restored}))
    metrics = [_line(step, 1) for step in (10, 20, 30)] + [_line(step, 2) for step in (30, 40)]
    metrics[1]["contrastive"] = math.nan
    metrics[1]["loss"] = math.inf
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"step": 50, "lo')
    validation = {"step": 40, "loss": 2.0, "contrastive": 1.5, "reconstruction": 0.5, "R@1": 0.1, "R@5": 0.5}
    validation |= {"gallery": 200, "chance_R@5": 0.025, "schema_to_image_R@5": 0.4, "image_to_schema_R@5": 0.6}
    (folder / "validation.jsonl").write_text(json.dumps({**validation, "attempt": 2}) + "\n")
    if evaluated:
        eval_path(folder, "test").write_text(json.dumps(_evaluation(dims)))
        _write_scenes(folder)
    return folder


def _line(step: int, attempt: int) -> dict:
    losses = {"loss": 3.0 / step, "contrastive": 2.0 / step, "reconstruction": 1.0 / step}
    rest = {"lr": 1e-4, "grad_norm": 1.0, "images_per_second": 100.0, "world_size": 1, "zero_stage": 1}
    return {"step": step, "epoch": step / 100, **losses, **rest, "attempt": attempt}


def _evaluation(dims: int) -> dict:
    def direction(*values: float) -> dict:
        names = ("R@1", "R@5", "R@10", "median_rank")
        return dict(zip(names, values, strict=True)) | {
            f"{name}_optimistic": value for name, value in zip(names, values, strict=True)
        }

    part = {"slot_accuracy": 0.617, "IoU@0.5": 0.52, "pointing": None}
    ways = {"argmax": part, "hungarian": part, "oracle": {**part, "slot_accuracy": 0.993}}
    ways["floor"] = {**part, "slot_accuracy": 0.091}
    return {
        "split": "test",
        "step": 40,
        "checkpoint": "step-00000040",
        "samples": 200,
        "view": "official view at 128x128",
        "position_dims": dims,
        "retrieval": {
            "gallery": 200,
            "chance": {"R@1": 0.005, "R@5": 0.025, "R@10": 0.05},
            "image_to_schema": direction(0.31, 0.75, 0.88, 3.0),
            "schema_to_image": direction(0.29, 0.705, 0.83, 4.0),
        },
        "discovery": {
            "ARI": 0.2, "FG-ARI": 0.743, "mBO": 0.512, "mIoU": 0.498, "mIoU_official": 0.5, "images": 199,
            "images_left_out": 1,
        },
        "grounding": {
            "primitives": 900, "primitives_left_out": 40, **ways,
            "by_size": {"large": {"primitives": 900, **ways}}, "by_objects": {"3": {"primitives": 900, **ways}},
        },
    }  # fmt: skip


def _write_scenes(folder: Path) -> None:
    """Object 1 is slot 4's but for nothing; object 2's word points to the background's slot; object 3 is hidden."""
    truth_HW, segments_HW = np.zeros((24, 32), np.uint8), np.full((24, 32), 7, np.uint8)
    truth_HW[4:10, 4:12], segments_HW[4:10, 4:12] = 1, 4
    truth_HW[14:20, 18:28], segments_HW[14:20, 18:28] = 2, 2
    primitives = [
        {"text": "large cube, <b>gold_leaf", "slot": 4, "position": [0, 0, 0]},
        {"text": "small sphere, tin", "slot": 7, "position": [0, 0, 0]},
        {"text": "small cube, tin", "slot": 9, "position": [0, 0, 0]},
    ]
    np.savez_compressed(
        scenes_path(folder, "test"),
        images_KHW3=np.full((1, 24, 32, 3), 99, np.uint8),
        truth_KHW=truth_HW[None],
        segments_KHW=segments_HW[None],
        scenes=np.array(json.dumps([{"key": "000042", "primitives": primitives, "schema_rank": 2, "image_rank": 5}])),
    )


@pytest.fixture
def folder(tmp_path):
    return _write_run(tmp_path / "my-run")


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The page of a run that no test changes."""
    return render(_write_run(tmp_path_factory.mktemp("runs") / "my-run"))


def test_the_verb_writes_a_page_and_prints_its_path(folder, capsys):
    run(ReportConfig(folder))
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8") == render(folder)
    assert not list(folder.glob("*.tmp"))


def test_the_page_parses_and_needs_nothing_beside_it(html):
    page = Page(html)
    addresses = [attributes.get(name) for _, attributes in page.tags for name in ("src", "href", "xlink:href")]
    assert all(address.startswith(("data:", "#")) for address in addresses if address)
    assert not re.search(r"https?://", html)
    assert "@import" not in html
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in addresses if address and address[0] == "#"} <= set(ids)


@pytest.mark.parametrize(
    "figure",
    [
        "75.0 %", "30 × chance", "2.5 %", "70.5 %", "28.2 × chance", "31.0 %", "29.0 %", "3 of 200",
        "0.743", "0.512", "0.498", "official view at 128x128", "61.7 %", "floor 9.1 %", "oracle 99.3 %",
        "40 steps", "4,321", "my-run", "dct", "4 and then 2 ranks", "2 attempts", "123,456", "0.18",
        "feed" * 16, "±6.0", "own description ranked 2 , own picture 5 of 200",
        "1 of 2 words on their object’s best slot, 1 with IoU ≥ 0.5",
    ],
)  # fmt: skip
def test_the_page_has_the_figures(html, figure):
    assert figure in Page(html.replace("</b>", "</b> ")).words()


def test_words_from_the_data_are_escaped(html):
    assert "<b>gold" not in html
    assert "<b>gold leaf" in Page(html).words()


def test_only_values_that_differ_from_the_default_are_marked(html):
    changed = re.findall(r'<div class="changed"><dt>(\w+)</dt><dd>([^<]*)<small>default ([^<]*)<', html)
    assert changed == [("tau", "0.37", "0.1")]


def test_each_word_stands_beside_its_slot(html):
    items = re.findall(r'<li data-slot="(\d+)".*?>(✓|✗|not in sight).*?</li>', html, flags=re.DOTALL)
    assert items == [("4", "✓"), ("7", "✗"), ("9", "not in sight")]


def test_superseded_points_are_left_out(folder):
    assert [line["step"] for line in read_lines(folder, METRICS)] == [10, 20, 30, 30, 40]
    assert [(line["step"], line["attempt"]) for line in standing_lines(folder, METRICS)] == [
        (10, 1), (20, 1), (30, 2), (40, 2),
    ]  # fmt: skip
    voided = render(folder)
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"contrastive": ', '"contrastive": 777')
    (folder / METRICS).write_text("".join(lines))
    assert render(folder) == voided


def test_torn_lines_are_passed_over_wherever_they_are(tmp_path):
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n{"step": 2, "lo{"step": 3}\n[]\n\n{"step": 4}\n{"step": \xff')
    assert read_lines(tmp_path, METRICS) == [{"step": 1}, {"step": 4}]
    assert read_lines(tmp_path, "no-such.jsonl") == []


def test_the_time_of_all_attempts_is_shown(folder):
    (folder / "events").mkdir()
    for number, seconds in ((1, {"start": 10.0, "step": 60.0}), (2, {"restore": 5.0, "step": 25.0})):
        stop = {"kind": "stop", "step": 30 * number, "t0": 0.0, "t1": 0.0, "facts": {}, "seconds": seconds}
        (folder / f"events/attempt-{number:04d}-rank-00000.jsonl").write_text(json.dumps(stop) + "\n")
        attempt = folder / f"attempts/attempt-{number:04d}.json"
        attempt.write_text(json.dumps(json.loads(attempt.read_text()) | {"started": 1.7e9 + 100 * number}))
    words = Page(render(folder)).words()
    assert "Where the time went" in words
    for row in (
        "queue30.0 s23.1 %",
        "start10.0 s7.7 %",
        "restore5.0 s3.8 %",
        "step1:05 min50.0 %",
        "replayed20.0 s15.4 %",
    ):
        assert row in words


def test_losses_that_are_no_numbers_are_named(html):
    assert "The loss was not a finite number in 1 logged step, first in step 20." in Page(html).words()


@pytest.mark.parametrize(("dims", "said"), [(3, "z tells the size"), (2, "Positions are x and y.")])
def test_the_page_says_what_positions_give_away(tmp_path, dims, said):
    assert said in Page(render(_write_run(tmp_path / "run", dims=dims))).words()


def test_without_an_evaluation_the_page_says_what_to_do(tmp_path):
    folder = _write_run(tmp_path / "run", evaluated=False)
    page = Page(render(folder))
    assert f"nsi eval {folder} --split test" in page.words()
    assert "60.0 %" in page.words()  # the last validation's
    assert "FG-ARI" not in page.words()


def test_the_test_split_comes_first_and_others_stand_beside_it(folder):
    other = _evaluation(3) | {"split": "val"}
    other["discovery"]["FG-ARI"] = 0.666
    eval_path(folder, "val").write_text(json.dumps(other))
    words = Page(render(folder)).words()
    assert re.search(r"FG-ARI 0\.743 0\.666", words)


def test_a_sparse_run_still_gives_a_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "Not yet trained." in Page(render(tmp_path)).words()
    eval_path(tmp_path, "test").write_text('{"retrieval": {"gallery": 9}, "discovery": {}, "grounding": {}}')
    Page(render(tmp_path))


@pytest.mark.parametrize("broken", ["config.json", "eval-test.json", "eval-test-scenes.npz"])
def test_a_broken_file_is_named(folder, broken):
    (folder / broken).write_bytes(b"{")
    with pytest.raises(UserError, match=broken):
        render(folder)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no run \(it has no config.json\)") as caught:
        run(ReportConfig(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def _inside(path: str, x: float, y: float) -> bool:
    """Even-odd rule, by the crossings of a ray to the right."""
    crossings = 0
    for loop in re.findall(r"M([^Z]*)Z", path):
        points = [tuple(map(float, point.split())) for point in loop.split("L")]
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                crossings += 1
    return crossings % 2 == 1


def test_outlines_hold_their_pixels_and_no_others():
    rng = np.random.default_rng(3)
    inside_HW = rng.random((9, 13)) < 0.5
    inside_HW[:4, :5] = True
    inside_HW[1, 2] = False  # a hole
    path = outline(inside_HW)
    found_HW = [[_inside(path, column + 0.5, row + 0.49) for column in range(13)] for row in range(9)]
    np.testing.assert_array_equal(found_HW, inside_HW)
    assert outline(np.zeros((3, 3), bool)) == ""


def test_slot_shapes_cover_the_frame_and_their_numbers_lie_inside():
    segments_HW = np.full((20, 30), 3)
    segments_HW[5:15, 5:25] = 11
    segments_HW[8:12, 8:22] = 3  # a hole: the centroid of slot 11 is outside of it
    shapes = slot_shapes(segments_HW)
    assert [shape.slot for shape in shapes] == [3, 11]
    assert sum(shape.share for shape in shapes) == pytest.approx(1)
    for shape in shapes:
        assert segments_HW[int(shape.y), int(shape.x)] == shape.slot
        assert _inside(shape.path, shape.x, shape.y)


def test_slot_colours_differ_and_are_readable():
    assert len({slot_colour(slot) for slot in range(2 * len(SLOT_COLOURS))}) == 2 * len(SLOT_COLOURS)
    assert (text_colour("#ffffff"), text_colour("#000000")) == ("#000000", "#ffffff")


def test_charts_bear_gaps_and_say_nothing_where_there_is_nothing():
    assert chart("x", [Series("train", [], []), Series("train", [1, 2], [math.nan, None])]) == ""
    svg = chart("x", [Series("train", range(200), [math.nan, math.inf, *range(198)])], level=(3.0, "chance 3"))
    Page(svg)
    assert "chance 3" in svg
    assert "var(--train)" in svg
    assert "nan" not in svg
    assert svg == chart("x", [Series("train", range(200), [math.nan, math.inf, *range(198)])], level=(3.0, "chance 3"))


def test_numbers_in_few_characters():
    assert [short_number(value) for value in (0, 0.25, 2.4e-4, 8e-5, 20000, 2.5e6)] == [
        "0", "0.25", "2.4e-4", "8e-5", "20k", "2.5M",
    ]  # fmt: skip
    assert [share(value) for value in (0.958, 0.0002, 0, 1, None, math.nan)] == [
        "95.8\u00a0%", "0.02\u00a0%", "0.0\u00a0%", "100.0\u00a0%", "–", "–",
    ]  # fmt: skip
    assert [count(value) for value in (12345, 3.0, 3.5, None)] == ["12,345", "3", "3.5", "–"]
    assert spread(0.5, 400) == "±4.9"
    assert spread(None, 400) == ""
