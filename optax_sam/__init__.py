"""Sharpness-aware minimization as Optax gradient transformations.

SAM is a better gradient. A *link* is an ``optax.GradientTransformationExtraArgs`` that turns the clean gradient g at w
into another, such as the SAM gradient s at w + ε. It stands first in a chain, and what follows is plain Optax::

    tx = optax.chain(optax_sam.sam(rho=0.05), optax.adamw(1e-3))
    updates, state = tx.update(grads, state, params, grad_fn=jax.grad(loss_fn), batch=batch)

An *ascent* is a transformation from g to the perturbation ε, and a *combinator* makes a link of links.

The papers, at two gradients per step
    ``sam``, ``usam``, ``asam``, ``stable_sam``, ``msam``, ``gsam``, ``wsam``, ``friendly_sam``, ``vasso``; for their
    arguments ``rho_by_learning_rate``, ``normalization_layers``, ``no_vectors``
The papers, cheaper
    ``late``, ``sam_every``, ``look_sam``, ``ae_sam``; at one gradient ``momentum_sam``, ``lagged_sam``, ``random_sam``
Ascents, and the link that takes one
    ``normalized_ascent``, ``unnormalized_ascent``, ``adaptive_ascent``, ``sharpness_aware``; directions
    other than g: ``random_direction``, ``less_average``
Combinators
    ``combined``: of g and s. ``renormalized``: s at the length of g. ``micro_batched``: one ε for each micro-batch,
    then the mean. ``switch_at``, ``switch_by``, ``switch_on``: which link is active, by the step or by the gradient.
    ``one_gradient``, ``on_momentum``: without the clean gradient. ``sharded``: norms over shards of the params.
    ``measured``, read by ``measurements``: norms, angle and losses of the last update.
The estimator, which evaluates the clean gradient, the loss and aux too
    ``value_and_grad``, ``gradient_estimator``: micro-batches, accumulation, weights, several devices.
For a link of your own
    ``norm``, ``vdot``: in float32, over all leaves and shards.
Imported by name
    ``optax_sam.nnx``: the estimator for models of Flax NNX. ``optax_sam.testing``: checks for a link of your own.
How sharp the loss is
    ``hessian_eigenvalues``, ``hessian_trace``, ``spectral_density``, ``m_sharpness``, ``average_sharpness``,
    ``loss_along``, ``loss_surface``; while training ``track_eigenvalue``, ``sam_edge``, ``directional_sharpness``,
    ``critical_sharpness``; with ``gauss_newton`` in place of the loss, of the Gauss-Newton matrix
"""

from optax_sam._norms import norm, vdot
from optax_sam.ascent import (
    AscentState,
    AverageState,
    adaptive_ascent,
    less_average,
    normalized_ascent,
    random_direction,
    unnormalized_ascent,
)
from optax_sam.averaging import AveragedState, micro_batched
from optax_sam.cheaper import (
    LookSAMState,
    SquareNormState,
    ae_sam,
    lagged_sam,
    late,
    look_sam,
    momentum_sam,
    random_sam,
    sam_every,
)
from optax_sam.combination import combined
from optax_sam.estimator import GradientEstimator, gradient_estimator, value_and_grad
from optax_sam.family import (
    asam,
    friendly_sam,
    gsam,
    msam,
    rho_by_learning_rate,
    sam,
    stable_sam,
    usam,
    vasso,
    wsam,
)
from optax_sam.link import SharpnessAwareState, sharpness_aware
from optax_sam.masks import no_vectors, normalization_layers
from optax_sam.measurement import MeasuredState, Measurements, measured, measurements
from optax_sam.renormalization import renormalized
from optax_sam.sharding import sharded
from optax_sam.sharpness import (
    average_sharpness,
    critical_sharpness,
    directional_sharpness,
    gauss_newton,
    hessian_eigenvalues,
    hessian_trace,
    loss_along,
    loss_surface,
    m_sharpness,
    sam_edge,
    spectral_density,
    track_eigenvalue,
)
from optax_sam.single_pass import MomentumState, on_momentum, one_gradient
from optax_sam.switching import SwitchState, switch_at, switch_by, switch_on

__version__ = "0.1.0"

__all__ = [
    "AscentState",
    "AverageState",
    "AveragedState",
    "GradientEstimator",
    "LookSAMState",
    "MeasuredState",
    "Measurements",
    "MomentumState",
    "SharpnessAwareState",
    "SquareNormState",
    "SwitchState",
    "adaptive_ascent",
    "ae_sam",
    "asam",
    "average_sharpness",
    "combined",
    "critical_sharpness",
    "directional_sharpness",
    "friendly_sam",
    "gauss_newton",
    "gradient_estimator",
    "gsam",
    "hessian_eigenvalues",
    "hessian_trace",
    "lagged_sam",
    "late",
    "less_average",
    "look_sam",
    "loss_along",
    "loss_surface",
    "m_sharpness",
    "measured",
    "measurements",
    "micro_batched",
    "momentum_sam",
    "msam",
    "no_vectors",
    "norm",
    "normalization_layers",
    "normalized_ascent",
    "on_momentum",
    "one_gradient",
    "random_direction",
    "random_sam",
    "renormalized",
    "rho_by_learning_rate",
    "sam",
    "sam_edge",
    "sam_every",
    "sharded",
    "sharpness_aware",
    "spectral_density",
    "stable_sam",
    "switch_at",
    "switch_by",
    "switch_on",
    "track_eigenvalue",
    "unnormalized_ascent",
    "usam",
    "value_and_grad",
    "vasso",
    "vdot",
    "wsam",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
