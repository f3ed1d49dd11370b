"""Pictures from records: each can be drawn again, and shows the numbers that were measured."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks import explain, redraw

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("name", redraw.FIGURES)
def test_pictures_are_drawn_from_their_records(name):
    figure = redraw.figure_of(name)
    assert (redraw.RESULTS / f"{name}.png").exists()
    assert all(axis.has_data() for axis in figure.axes)
    plt.close(figure)


def test_means_stand_beside_their_points():
    record = json.loads((redraw.RESULTS / "msam.json").read_text(encoding="utf-8"))
    figure = redraw.figure_of("msam")
    shown = {text.get_text() for axis in figure.axes for text in axis.texts}
    expected = {f"{np.mean(values['eigenvalue']):.1f}" for values in record["text"].values()}
    assert expected == {"115.6", "48.1", "30.6"}
    assert expected <= shown
    plt.close(figure)


def test_arrows_are_those_of_the_formulas():
    figure = explain.draw_step()
    plain, sam = figure.axes[1].lines[-2:]
    w, steps = np.array(explain.START), {}
    gradient = lambda point: np.array([point[0] * point[1] ** 2, point[0] ** 2 * point[1]])  # noqa: E731
    climbed = w + explain.RHO * gradient(w) / np.linalg.norm(gradient(w))
    steps = {"plain": w - explain.RATE * gradient(w), "sam": w - explain.RATE * gradient(climbed)}
    for name, line in (("plain", plain), ("sam", sam)):
        np.testing.assert_allclose(line.get_xydata()[1], steps[name], rtol=1e-5)
    plt.close(figure)
    plt.close(explain.draw_shared())
