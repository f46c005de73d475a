"""One colour and marker for each activation, and axes that outliers do not squeeze."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from megapoly.activations.registry import ACTIVATIONS
from megapoly.study.analysis import figures as analysis_figures
from megapoly.study.figure_style import STYLES, mark_outliers, robust_limits
from megapoly.study.theory.figures import POLYRELU, RELU


def test_every_activation_has_colours_and_a_marker_of_its_own():
    assert list(STYLES) == list(ACTIVATIONS)
    for field in ("light", "dark", "marker"):
        assert len({getattr(style, field) for style in STYLES.values()}) == len(STYLES)


def test_figures_of_analyses_and_theory_have_the_colours_of_the_activations():
    statistics = {"kurtosis": 3.0, "max_over_rms": 2.0, "near_zero": 0.1}
    analyses = [
        {
            "activation": name,
            "label": label,
            "activations": [{"layer": 0, "kind": "ffn", "after": statistics, "flat": 0.1}],
        }
        for name, label in (("relu", "a"), ("polynorm", "b"), ("relu", "c"))
    ]
    lines = analysis_figures.activation_statistics(analyses).axes[0].lines
    colours = {line.get_label(): line.get_color() for line in lines}
    relu, polynorm = STYLES["relu"], STYLES["polynorm"]
    assert colours == {"a": relu.light, "b": polynorm.light, "c": relu.light}
    markers = [(line.get_marker(), line.get_fillstyle()) for line in lines]
    assert markers == [(relu.marker, "full"), (polynorm.marker, "full"), (relu.marker, "none")]
    assert (RELU, POLYRELU) == (relu.light, STYLES["polyrelu"].light)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_an_outlier_is_marked_at_the_edge_and_does_not_squeeze_the_axis(axis):
    values = [*np.linspace(4.0, 4.2, 19), 6.5]
    axes = Figure().subplots()
    low, high = robust_limits(values)
    assert 3.9 < low < 4.0 and 4.2 < high < 4.3
    getattr(axes, f"set_{axis}lim")(low, high)
    getattr(axes, f"set_{axis}label")("loss")
    mark_outliers(axes, axis, [(value, 3.0, "#123456") for value in values])
    (arrow,) = axes.lines
    edge, position = arrow.get_xydata()[0] if axis == "x" else arrow.get_xydata()[0][::-1]
    assert (edge, position, arrow.get_marker()) == (1.0, 3.0, ">" if axis == "x" else "^")
    assert [text.get_text() for text in axes.texts] == ["6.500"]
    assert getattr(axes, f"get_{axis}label")() == "loss\n(arrow: beyond the axis)"


def test_values_that_are_many_or_near_are_no_outliers():
    assert robust_limits([4.0, 4.1, 4.2, 4.3, 4.9])[1] > 4.9
    two_groups = [*np.linspace(4.0, 4.2, 16), 9.0, 9.1, 9.2]
    assert robust_limits(two_groups)[1] > 9.2
    low, high = robust_limits([2.0, 2.0, 2.0])
    assert low < 2.0 < high
