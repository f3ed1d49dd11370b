"""One look for all pictures: few colors that everybody can tell apart, and no ink that says nothing."""

from matplotlib.axes import Axes

# Of Okabe and Ito, safe for the color-blind.
PLAIN, SAM, MSAM, STABLE, LATE, UNNORMALIZED, ADAPTIVE = (
    "#555555",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#e69f00",
    "#56b4e9",
    "#cc79a7",
)
COLORS = {
    "sgd": PLAIN,
    "sam": SAM,
    "usam": UNNORMALIZED,
    "asam": ADAPTIVE,
    "msam": MSAM,
    "stable_sam": STABLE,
    "late_sam": LATE,
}


def tidy(*axes: Axes) -> None:
    """A faint grid, and no frame on the right and above."""
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
