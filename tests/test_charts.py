"""Pictures: positions worked out by hand, and text that cannot become markup."""

import xml.etree.ElementTree as ET

import pytest

from opentao.charts import Chart, Level, Scale, Series, draw, spread, ticks
from opentao.summary import Mean


def mean(value: float | None, half: float | None = 0.1) -> Mean:
    known = value is not None and half is not None
    return Mean(mean=value, low=value - half if known else None, high=value + half if known else None, n=9)


def chart(*series: Series, levels: tuple[Level, ...] = ()) -> Chart:
    return Chart(title="T", x_label="k", x_ticks={0.0: "1", 1.0: "2"}, series=series, levels=levels)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (-3.2, 4.9, [-4.0, -2.0, 0.0, 2.0, 4.0, 6.0]),
        (5.0, 5.0, [5.0, 6.0]),
        (0.0, 0.0, [0.0, 0.25]),
    ],
)
def test_ticks_are_round_and_span_the_data(low: float, high: float, expected: list[float]):
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    if high > low:
        assert marks == expected


def test_spread_keeps_order_and_distance():
    assert spread([10.0, 12.0, 100.0], 17.0) == [2.5, 19.5, 100.0]
    assert spread([50.0, 50.0, 50.0], 10.0) == [40.0, 50.0, 60.0]
    assert spread([30.0, 0.0], 10.0) == [30.0, 0.0]
    assert spread([]) == []


def test_scale_maps_the_corners():
    scale = Scale(right=386, x_low=0, x_high=4, y_low=0, y_high=1)
    assert (scale.x(0), scale.x(4)) == (72.0, 362.0)
    assert (scale.y(0), scale.y(1)) == (274.0, 14.0)


def test_a_band_needs_two_points_and_a_null_is_left_out():
    svg = draw(chart(Series(name="base", points={0.0: mean(0.2), 0.5: mean(None), 1.0: mean(0.6)}, style="base")))
    root = ET.fromstring(svg)
    tags = [element.tag for element in root.iter()]
    assert tags.count("circle") == 2
    assert tags.count("polygon") == 1
    single = draw(chart(Series(name="r", points={0.0: mean(0.2)}, style="tuned")))
    assert "polygon" not in single
    assert "whisker" in single


def test_nothing_to_draw():
    assert draw(chart(Series(name="base", points={0.0: mean(None)}, style="base"))) == ""
    assert draw(chart()) == ""


def test_names_are_escaped_and_shortened():
    line = Series(name="<script>", points={0.0: mean(0.1, None), 1.0: mean(0.2, None)}, style="base")
    svg = draw(chart(line, levels=(Level(name='"><img src=x onerror=1> and more', y=0.3, style="baseline"),)))
    assert "<script>" not in svg
    assert "<img" not in svg
    assert "&lt;script&gt;" in svg
    ET.fromstring(svg)


def test_level_stops_where_the_curve_meets_it():
    line = Series(name="base", points={0.0: mean(0.0), 1.0: mean(1.0)}, style="base")
    svg = draw(chart(line, levels=(Level(name="", y=0.5, style="tuned", end=0.5, drop="k = 1.4"),)))
    assert "k = 1.4" in svg
    assert svg.count('class="level tuned"') == 2
    assert "leader" in svg  # only the base has a name at the edge
    assert svg.count("leader") == 1
