"""Sharpness-aware minimization as Optax gradient transformations."""

from optax_sam._norms import norm, vdot
from optax_sam.ascent import AscentState, adaptive_ascent, normalized_ascent, unnormalized_ascent
from optax_sam.averaging import micro_batched
from optax_sam.estimator import GradientEstimator, gradient_estimator, value_and_grad
from optax_sam.family import asam, late, msam, sam, stable_sam, usam
from optax_sam.link import SharpnessAwareState, sharpness_aware
from optax_sam.measurement import MeasuredState, Measurements, measured, measurements
from optax_sam.renormalization import renormalized
from optax_sam.sharding import sharded
from optax_sam.sharpness import (
    average_sharpness,
    hessian_eigenvalues,
    hessian_trace,
    loss_along,
    loss_surface,
    m_sharpness,
    spectral_density,
)
from optax_sam.switching import SwitchState, switch_at, switch_by

__version__ = "0.1.0"

__all__ = [
    "AscentState",
    "GradientEstimator",
    "MeasuredState",
    "Measurements",
    "SharpnessAwareState",
    "SwitchState",
    "adaptive_ascent",
    "asam",
    "average_sharpness",
    "gradient_estimator",
    "hessian_eigenvalues",
    "hessian_trace",
    "late",
    "loss_along",
    "loss_surface",
    "m_sharpness",
    "measured",
    "measurements",
    "micro_batched",
    "msam",
    "norm",
    "normalized_ascent",
    "renormalized",
    "sam",
    "sharded",
    "sharpness_aware",
    "spectral_density",
    "stable_sam",
    "switch_at",
    "switch_by",
    "unnormalized_ascent",
    "usam",
    "value_and_grad",
    "vdot",
]
