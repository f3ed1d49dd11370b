r"""Plots of what the instruments return; needs ``pip install "optax_sam[plot]"``.

Each function draws into the ``axes`` it is given, or into those of a new figure, and returns them. Import the module by
name, ``from optax_sam.sharpness import plots``: the package itself does not import it.
"""

from typing import TYPE_CHECKING

import numpy as np

from optax_sam.sharpness.hessian import Eigenvalues, SpectralDensity
from optax_sam.sharpness.landscape import Line, Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE = "#0072b2", "#d55e00"


def plot_eigenvalues(found: Eigenvalues, *, axes: "Axes | None" = None) -> "Axes":
    """Eigenvalues in descending order, with their residuals as error bars.

    Args:
        found: as returned by :func:`optax_sam.hessian_eigenvalues`.
        axes: where to draw; None: in a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> found = Eigenvalues(np.array([10.0, 3.0]), np.array([0.1, 0.2]), num_products=20, converged=True)
        >>> print(plot_eigenvalues(found).get_ylabel())
        eigenvalue
    """
    axes = _axes(axes)
    places = np.arange(1, len(found.values) + 1)
    axes.vlines(places, 0, found.values, color=BLUE, linewidth=1, alpha=0.5)
    axes.errorbar(places, found.values, yerr=found.residuals, color=BLUE, linestyle="none", marker="o", capsize=3)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="largest first", ylabel="eigenvalue", xticks=places)
    return axes


def plot_spectral_density(
    density: SpectralDensity, *, width: float | None = None, axes: "Axes | None" = None
) -> "Axes":
    """The density of eigenvalues on a logarithmic scale, which shows single outliers beside the bulk.

    Args:
        density: as returned by :func:`optax_sam.spectral_density`.
        width: standard deviation of the Gaussians it is smoothed with, > 0; None: a hundredth of the range of the
            nodes.
        axes: where to draw; None: in a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: width ≤ 0.

    Example:
        >>> density = SpectralDensity(nodes=np.array([[0.0, 1.0]]), weights=np.array([[0.9, 0.1]]))
        >>> print(plot_spectral_density(density).get_xlabel())
        eigenvalue

    Reference:
        Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian Eigenvalue Density
        <https://arxiv.org/abs/1901.10159>`_, 2019
    """
    low, high = float(np.min(density.nodes)), float(np.max(density.nodes))
    if width is None:
        width = (high - low or abs(high) or 1.0) / 100
    axes = _axes(axes)
    positions = np.linspace(low - 5 * width, high + 5 * width, 2_001)
    values = density.smoothed(positions, width)
    axes.plot(positions, values, color=BLUE, linewidth=1.2)
    axes.fill_between(positions, values, color=BLUE, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(np.max(values) * 1e-7, np.max(values) * 3)
    axes.set(xlabel="eigenvalue", ylabel="density")
    return axes


def plot_line(line: Line, *, axes: "Axes | None" = None) -> "Axes":
    """The loss on a line and, on a second scale at the right, its second differences.

    Args:
        line: as returned by :func:`optax_sam.loss_along`.
        axes: where to draw; None: in a new figure.

    Returns:
        The axes of the losses.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> line = Line(np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 0.9]), np.array([0.4, 0.4, 0.4]))
        >>> print(plot_line(line).get_ylabel())
        loss
    """
    axes = _axes(axes)
    right = axes.twinx()
    right.spines[["top", "left"]].set_visible(False)
    for side, values, color, name, style in (
        (axes, line.losses, BLUE, "loss", "-"),
        (right, line.second_differences, ORANGE, "second difference", "--"),
    ):
        side.plot(line.positions, values, color=color, linestyle=style, linewidth=1.6)
        side.set_ylabel(name, color=color)
        side.tick_params(axis="y", colors=color)
    axes.set_xlabel("λ")
    for end in (0, 1):
        axes.axvline(end, color="black", linewidth=0.8, linestyle=":")
    return axes


def plot_surface(surface: Surface, *, axes: "Axes | None" = None) -> "Axes":
    """The loss on a plane, as contours at equal ratios; the params are at the cross.

    Args:
        surface: as returned by :func:`optax_sam.loss_surface`.
        axes: where to draw; None: in a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> x = np.linspace(-1, 1, 5)
        >>> axes = plot_surface(Surface(x, 0.1 + x[:, None] ** 2 + 2 * x**2))
        >>> print(axes.get_xlabel())
        first direction

    Reference:
        Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018
    """
    axes = _axes(axes)
    losses = np.ma.masked_invalid(surface.losses.T)
    low, high = float(np.min(losses)), float(np.max(losses))
    levels = np.geomspace(low, high, 25) if 0 < low < high else np.linspace(low, high if high > low else low + 1, 25)
    contours = axes.contourf(
        surface.positions, surface.positions, losses, levels, cmap="viridis", norm="log" if low > 0 else "linear"
    )
    axes.contour(contours, levels=levels[::2], colors="white", linewidths=0.5, alpha=0.6)
    axes.grid(visible=False)
    axes.plot(0, 0, color="white", marker="+", markersize=10, markeredgewidth=1.5)
    axes.figure.colorbar(contours, ax=axes, label="loss", ticks=levels[::4], format=lambda value, _: f"{value:.3g}")
    axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    return axes


def _axes(axes: "Axes | None") -> "Axes":
    """The axes, or those of a new figure."""
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt  # of the extra "plot"

    _, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
