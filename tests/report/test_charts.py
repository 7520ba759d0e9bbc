from __future__ import annotations

import math
import re

import numpy as np
import pytest

from megatron_vcr1.report.charts import HEIGHT, MAX_POINTS, WIDTH, Chart, Line, draw, short, words


def line(values, label="value", first_step=1):
    return Line(label, np.arange(first_step, first_step + len(values)), np.array(values, np.float64), colour=0)


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_a_short_line_passes_through_every_value():
    drawing = draw(Chart("t", "u", [line([0.0, 5.0, 10.0])]))
    left, top, right, bottom = drawing.plot
    (x0, y0), (x1, y1), (x2, y2) = numbers(drawing.strokes[0].path)
    assert (x0, x2) == (left, right) and x1 == pytest.approx((left + right) / 2, abs=0.1)
    assert y0 == bottom and y1 == pytest.approx((y0 + y2) / 2, abs=0.1) and top < y2 < y1
    assert drawing.strokes[0].band == "" and drawing.steps_per_point == 1
    assert [column.text for column in drawing.columns] == [
        "step 1\nvalue 0",
        "step 2\nvalue 5",
        "step 3\nvalue 10",
    ]


def test_many_steps_become_a_hundred_points_and_the_band_keeps_spikes():
    values = np.zeros(10_000)
    values[5_050] = 100.0
    drawing = draw(Chart("t", "u", [line(values)]))
    stroke = drawing.strokes[0]
    assert len(numbers(stroke.path)) == len(drawing.columns) == MAX_POINTS and drawing.steps_per_point == 100
    ys = [y for _, y in numbers(stroke.path)]
    band = [y for _, y in numbers(stroke.band)]
    _, top, _, bottom = drawing.plot
    assert min(band) < top + 8  # the spike itself, 4 % below the top
    assert min(ys) == pytest.approx(bottom - (bottom - min(band)) / 100, abs=0.2)  # a point is the mean of 100


def test_lines_of_different_lengths_share_the_axis_of_steps():
    drawing = draw(Chart("t", "u", [line(np.ones(300), "long"), line(np.full(30, 2.0), "short")]))
    long, short_ = (numbers(stroke.path) for stroke in drawing.strokes)
    assert len(long) == 100 and len(short_) == 10
    assert drawing.columns[0].text == "step 2\nlong 1\nshort 2" and drawing.columns[-1].text == "step 299\nlong 1"


@pytest.mark.parametrize("values", [[], [math.nan], [math.nan] * 5])
def test_lines_without_finite_values_give_no_chart(values):
    assert draw(Chart("t", "u", [line(values)])) is None


@pytest.mark.parametrize(
    "values", [[0.0], [3.0] * 4, [-2.0, -2.0], [1e-9, 2e-9], [1e12, -1e12], [math.nan, 1.0, math.nan]]
)
@pytest.mark.parametrize("stacked", [False, True])
def test_every_coordinate_is_inside_the_image(values, stacked):
    values = np.abs(values) if stacked else values
    drawing = draw(Chart("t", "u", [line(values), line(values, "again")], stacked=stacked))
    points = [point for stroke in drawing.strokes for point in numbers(stroke.path) + numbers(stroke.band)]
    assert points and all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert all(0 <= tick.position <= WIDTH for tick in drawing.x_ticks)
    assert drawing.y_ticks and all(0 <= tick.position <= HEIGHT for tick in drawing.y_ticks)


def test_a_missing_value_leaves_a_gap():
    drawing = draw(Chart("t", "u", [line([1.0, 2.0, math.nan, 4.0])]))
    assert drawing.strokes[0].path.count("M") == 2 and drawing.columns[2].text.startswith("step 4")


def test_areas_are_stacked():
    drawing = draw(Chart("t", "s", [line([1.0, 1.0], "a"), line([2.0, 2.0], "b")], stacked=True))
    lower, upper = (numbers(stroke.band) for stroke in drawing.strokes)
    assert {y for _, y in upper} & {y for _, y in lower}  # the bottom of the upper area is the top of the lower area
    heights = [max(y for _, y in area) - min(y for _, y in area) for area in (lower, upper)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.12345, "0.123"),
        (1.23e-6, "1.23e-06"),
        (1234.5, "1234"),
        (12345, "12.3k"),
        (3.4e6, "3.4M"),
        (-5e9, "-5G"),
    ],
)
def test_numbers_are_formatted_in_few_characters(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    "name, text",
    [("grounded_qa", "grounded QA"), ("iou", "IoU"), ("my_reward", "my reward"), ("IoP@0.5", "IoP@0.5")],
)
def test_names_from_files_are_spelled_for_readers(name, text):
    assert words(name) == text


@pytest.mark.parametrize(
    "low, high, texts",
    [
        (4.752, 4.764, ["4.755", "4.760"]),
        (0.0, 2e-13, ["0", "5e-14", "1e-13", "1.5e-13", "2e-13"]),
        (0.0, 40_000.0, ["0", "10k", "20k", "30k", "40k"]),
        (0.0, 2.0, ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        (1.11, 1.9, ["1.2", "1.4", "1.6", "1.8"]),
        (-0.05, 0.06, ["-0.05", "0.00", "0.05"]),
    ],
)
def test_ticks_are_round_and_distinct(low, high, texts):
    assert [tick.text for tick in draw(Chart("t", "u", [line([low, high])])).y_ticks] == texts


def test_an_axis_has_two_to_six_ticks():
    for low in np.linspace(1, 2, 50).tolist():
        for factor in np.geomspace(1.01, 1000, 50).tolist():
            assert 2 <= len(draw(Chart("t", "u", [line([low, low * factor])])).y_ticks) <= 6
