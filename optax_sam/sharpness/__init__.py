"""Instruments: how sharp the loss is, around params and between them; see :mod:`optax_sam.sharpness.streaming`."""

from optax_sam.sharpness.edge import critical_sharpness, directional_sharpness, sam_edge
from optax_sam.sharpness.hessian import (
    Eigenvalues,
    SpectralDensity,
    hessian_eigenvalues,
    hessian_trace,
    spectral_density,
)
from optax_sam.sharpness.landscape import Line, Surface, loss_along, loss_surface
from optax_sam.sharpness.linearization import gauss_newton
from optax_sam.sharpness.rise import average_sharpness, m_sharpness
from optax_sam.sharpness.streaming import Estimate
from optax_sam.sharpness.tracking import TrackedEigenvalue, track_eigenvalue

__all__ = [
    "Eigenvalues",
    "Estimate",
    "Line",
    "SpectralDensity",
    "Surface",
    "TrackedEigenvalue",
    "average_sharpness",
    "critical_sharpness",
    "directional_sharpness",
    "gauss_newton",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_along",
    "loss_surface",
    "m_sharpness",
    "sam_edge",
    "spectral_density",
    "track_eigenvalue",
]
