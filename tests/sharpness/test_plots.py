"""Plots: what is drawn is what was measured, and it renders."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from optax_sam.sharpness import Eigenvalues, Line, SpectralDensity, Surface, plots

EIGENVALUES = Eigenvalues(np.array([9.0, 4.0, -2.0]), np.array([0.1, 0.5, 0.2]), 20, True)
DENSITY = SpectralDensity(np.array([[0.0, 1.0], [0.0, 10.0]]), np.array([[0.9, 0.1], [0.8, 0.2]]))
LINE = Line(np.linspace(-0.2, 1.2, 8), np.linspace(1, 2, 8) ** 2, np.linspace(3, 5, 8))
GRID = np.linspace(-1, 1, 9)
SURFACE = Surface(GRID, 0.01 + 4 * GRID[:, None] ** 2 + GRID**2)
PLOTS = {
    "eigenvalues": (plots.plot_eigenvalues, EIGENVALUES),
    "density": (plots.plot_spectral_density, DENSITY),
    "line": (plots.plot_line, LINE),
    "surface": (plots.plot_surface, SURFACE),
}
every_plot = pytest.mark.parametrize(("plot", "result"), PLOTS.values(), ids=PLOTS)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def colored_pixels(axes):
    """How many pixels of the rendered figure are neither black, gray nor white."""
    canvas = axes.figure.canvas
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba(), int)[..., :3]
    return np.sum(np.ptp(image, axis=-1) > 30)


@every_plot
def test_plots_render_into_a_new_figure_or_given_axes(plot, result):
    axes = plot(result)
    assert colored_pixels(plt.subplots()[1]) == 0
    assert colored_pixels(axes) > 200
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    figure, (left, right) = plt.subplots(1, 2)
    number = len(plt.get_fignums())
    assert plot(result, axes=right) is right
    assert len(plt.get_fignums()) == number
    assert not left.has_data()
    assert right.has_data()
    assert right.figure is figure


@every_plot
def test_only_new_figures_need_matplotlib(plot, result, monkeypatch):
    axes = plt.subplots()[1]
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="matplotlib"):
        plot(result)
    plot(result, axes=axes)


def test_eigenvalues_have_their_residuals_as_bars():
    axes = plots.plot_eigenvalues(EIGENVALUES)
    [container] = axes.containers
    points, _, [bars] = container
    assert points.get_ydata().tolist() == [9.0, 4.0, -2.0]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, [[8.9, 9.1], [3.5, 4.5], [-2.2, -1.8]])


def test_density_is_the_smoothed_one():
    for options, width in (({}, 0.1), ({"width": 0.5}, 0.5)):
        axes = plots.plot_spectral_density(DENSITY, **options)
        [curve] = axes.lines
        positions = curve.get_xdata()
        np.testing.assert_allclose(curve.get_ydata(), DENSITY.smoothed(positions, width))
        np.testing.assert_allclose(np.trapezoid(curve.get_ydata(), positions), 1, rtol=1e-3)
        assert axes.get_yscale() == "log"
    wide = SpectralDensity(np.array([[-2.0, 4.0]]), np.array([[0.5, 0.5]]))
    axes = plots.plot_spectral_density(wide, width=0.5)
    positions, values = axes.lines[0].get_xydata().T
    assert (positions[0], positions[-1]) == (-2 - 5 * 0.5, 4 + 5 * 0.5)
    np.testing.assert_allclose(axes.get_ylim(), (1e-7 * values.max(), 3 * values.max()))
    narrow = plots.plot_spectral_density(wide).lines[0].get_xdata()  # a width of 0.06
    np.testing.assert_allclose((narrow[0], narrow[-1]), (-2.3, 4.3))
    one_place = SpectralDensity(np.zeros((2, 3)), np.full((2, 3), 1 / 3))
    assert colored_pixels(plots.plot_spectral_density(one_place)) > 200


def test_line_has_the_losses_and_on_a_second_scale_the_second_differences():
    axes = plots.plot_line(LINE)
    left, right = axes.figure.axes
    assert left is axes
    for side, values, label in ((left, LINE.losses, "loss"), (right, LINE.second_differences, "second difference")):
        np.testing.assert_array_equal(side.lines[0].get_xydata(), np.stack([LINE.positions, values], axis=1))
        assert side.get_ylabel() == label


def test_surface_has_the_first_direction_to_the_right():
    axes = plots.plot_surface(SURFACE)
    filled = axes.collections[0]
    lowest = filled.get_paths()[2].get_extents()
    assert lowest.width < 0.6 * lowest.height  # it is twice as steep along the first direction
    assert filled.norm.vmin == pytest.approx(0.01)
    assert filled.norm.vmax == pytest.approx(5.01)
    assert [other.get_ylabel() for other in axes.figure.axes] == ["second direction", "loss"]


@pytest.mark.parametrize(
    "losses",
    [
        np.where(GRID[:, None] > 0.5, np.nan, SURFACE.losses),
        np.where(GRID[:, None] > 0.5, np.inf, SURFACE.losses),
        SURFACE.losses - 1,
        SURFACE.losses - 0.01,
        np.full((9, 9), 2.0),
        np.zeros((9, 9)),
    ],
    ids=["nan", "inf", "negative", "zero", "constant", "zeros"],
)
def test_surface_of_any_losses_renders(losses):
    axes = plots.plot_surface(Surface(GRID, losses))
    assert colored_pixels(axes) > 5_000
    assert axes.collections[0].norm.vmin == np.min(losses[np.isfinite(losses)])
