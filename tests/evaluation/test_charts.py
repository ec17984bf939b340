"""Training curves and bars: known buckets, known places, valid SVG."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageFont

from fewstep.errors import FewstepError
from fewstep.evaluation.charts import BUCKETS, bars_svg, curve_svg, number, read_curves, ticks
from fewstep.evaluation.page import write_curves
from fewstep.evaluation.pictures import wrap


def write(path: Path, records: list[dict[str, float | None]]) -> Path:
    path.write_text("".join(json.dumps({"iteration": i + 1, **record}) + "\n" for i, record in enumerate(records)))
    return path


def numbers_of(path_data: str) -> list[tuple[float, float]]:
    points = path_data.replace("M", "L").strip("LZ").split("L")
    return [(float(x), float(y)) for x, y in (point.split() for point in points)]


def svg_paths(svg: str, css_class: str) -> list[str]:
    return [e.attrib["d"] for e in ElementTree.fromstring(svg) if e.attrib.get("class") == css_class]


def test_buckets_keep_mean_and_range(tmp_path: Path) -> None:
    values = [float(v) for v in range(4 * BUCKETS)]
    (curve,) = read_curves(write(tmp_path / "log.jsonl", [{"loss/student": v} for v in values]))
    assert curve.iterations == [4 * b + 2.5 for b in range(BUCKETS)]
    assert curve.low == [4.0 * b for b in range(BUCKETS)]
    assert curve.mean == [4 * b + 1.5 for b in range(BUCKETS)]
    assert curve.high == [4 * b + 3.0 for b in range(BUCKETS)]
    assert (curve.last, curve.not_finite) == (values[-1], 0)


def test_a_bucket_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    values = [None if i % 3 == 0 else float(i % 3) for i in range(3 * BUCKETS)]  # null, 1, 2
    (curve,) = read_curves(write(tmp_path / "log.jsonl", [{"loss/student": v} for v in values]))
    assert (curve.low, curve.mean, curve.high) == ([1.0] * BUCKETS, [1.5] * BUCKETS, [2.0] * BUCKETS)
    assert curve.not_finite == BUCKETS


def test_what_one_looks_at_first_comes_first_and_the_rest_is_left_out(tmp_path: Path) -> None:
    record = {
        "rate/student": 1.0,
        "time/iteration_s": 1.0,
        "metric/student/denoised_std": 1.0,
        "evaluate/frechet": 1.0,
        "metric/student/real_fake_gap": 1.0,
        "gradient_norm/critic": 1.0,
        "loss/critic": 1.0,
    }
    curves = read_curves(write(tmp_path / "log.jsonl", [record]))
    assert [c.name for c in curves] == [
        *("loss/critic", "gradient_norm/critic", "metric/student/real_fake_gap", "evaluate/frechet"),
        "metric/student/denoised_std",
    ]
    assert [c.is_main for c in curves] == [True] * 4 + [False]
    assert [c.title for c in curves][2:4] == ["student, real fake gap", "frechet"]


def test_the_line_breaks_where_nothing_is_finite(tmp_path: Path) -> None:
    values = [1.0, 2.0, None, None, 3.0, None]
    (curve,) = read_curves(write(tmp_path / "log.jsonl", [{"loss/student": v} for v in values]))
    assert curve.not_finite == 3
    assert math.isnan(curve.last)
    svg = curve_svg(curve)
    assert [len(numbers_of(d)) for d in svg_paths(svg, "line")] == [2, 1]
    assert "nan" not in svg


def test_a_number_logged_now_and_then_is_one_line(tmp_path: Path) -> None:
    records = [{"loss/student": 1.0} | ({"evaluate/frechet": 9.0 - i} if i % 5 == 0 else {}) for i in range(20)]
    curve = read_curves(write(tmp_path / "log.jsonl", records))[1]
    assert curve.iterations == [1.0, 6.0, 11.0, 16.0]
    (line,) = svg_paths(curve_svg(curve), "line")
    points = numbers_of(line)
    assert [x for x, _ in points] == [46.0, 134.0, 222.0, 310.0]
    assert [y for _, y in points] == sorted(y for _, y in points)  # falling values go down the page


@pytest.mark.parametrize(
    ("values", "logarithmic"), [([100.0, 10.0, 0.1], True), ([100.0, -1.0], False), ([5.0, 1.0], False)]
)
def test_values_of_many_decades_are_drawn_logarithmically(
    tmp_path: Path, values: list[float], logarithmic: bool
) -> None:
    (curve,) = read_curves(write(tmp_path / "log.jsonl", [{"loss/student": v} for v in values]))
    assert curve.is_logarithmic is logarithmic
    points = numbers_of(svg_paths(curve_svg(curve), "line")[0])
    assert all(46 <= x <= 310 and 10 <= y <= 144 for x, y in points)
    if logarithmic:  # 100 -> 10 is one decade, 10 -> 0.1 two
        (_, a), (_, b), (_, c) = points
        assert c - b == pytest.approx(2 * (b - a), abs=0.15)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, None])
def test_a_single_record_and_a_constant_can_be_drawn(tmp_path: Path, value: float | None) -> None:
    (curve,) = read_curves(write(tmp_path / "log.jsonl", [{"loss/student": value}]))
    ElementTree.fromstring(curve_svg(curve))
    assert ("never finite" in curve_svg(curve)) is (value is None)
    (curve,) = read_curves(write(tmp_path / "log.jsonl", [{"loss/student": value}] * 5))
    ElementTree.fromstring(curve_svg(curve))


def test_curves_png_has_a_panel_per_main_curve(tmp_path: Path) -> None:
    names = ("loss/student", "loss/critic", "gradient_norm/student", "evaluate/frechet", "metric/student/direction")
    log = write(tmp_path / "log.jsonl", [dict.fromkeys(names, 1.0 / (i + 1)) for i in range(300)])
    image = Image.open(io.BytesIO(write_curves(tmp_path / "curves.png", log).read_bytes()))
    assert image.format == "PNG"
    assert image.size == (1320, 638)  # two rows of three
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]


def test_a_log_without_curves_is_refused_for_a_png(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="found no training log"):
        write_curves(tmp_path / "curves.png", tmp_path / "log.jsonl")
    with pytest.raises(FewstepError, match="found no curve"):
        write_curves(tmp_path / "curves.png", write(tmp_path / "log.jsonl", [{"rate/student": 1.0}]))
    assert not (tmp_path / "curves.png").exists()


def test_bars_are_as_long_as_their_shares() -> None:
    root = ElementTree.fromstring(bars_svg(["<a>", "b", "c"], [0.2, 0.4, math.nan], 0.5))
    bars = [e.attrib for e in root if e.attrib.get("class") == "bar"]
    assert [float(b["width"]) for b in bars] == pytest.approx([26.4, 52.8, 0.0])
    assert [e.text for e in root if e.tag == "text"] == ["<a>", "20 %", "b", "40 %", "c", "—"]
    (uniform,) = [e.attrib["d"] for e in root if e.attrib.get("class") == "uniform"]
    assert float(uniform[1:].split()[0]) - float(bars[0]["x"]) == pytest.approx(66 / 3 / 0.5, abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0.1, 0.9, [0.2, 0.4, 0.6, 0.8]),
        (1, 400, [100, 200, 300, 400]),
        (-3, 3, [-2, 0, 2]),
        (2, 2, []),
    ],
)
def test_ticks_are_round_numbers_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (12.345, "12.3"),
        (1500, "1500"),
        (20000, "20k"),
        (2e-6, "2e-06"),
        (math.nan, "—"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_are_brief(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("text", ["", "a frog", "word " * 100, "x" * 500, "a " + "y" * 60, "tab\tand\nnewline"])
@pytest.mark.parametrize("lines", [1, 4])
def test_wrapped_lines_fit(text: str, lines: int) -> None:
    font = ImageFont.load_default(13)
    wrapped = wrap(text, font, 128, lines)
    assert 1 <= len(wrapped) <= lines
    assert all(font.getlength(line) <= 128 for line in wrapped)
    joined, given = "".join(wrapped).replace(" ", ""), "".join(text.split())
    assert joined == given or (joined.endswith("…") and given.startswith(joined[:-1]))
