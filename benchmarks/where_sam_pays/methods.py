"""The methods that are compared: a link each, and where the search for its rho begins."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

import optax_sam


class Method(NamedTuple):
    """What stands in front of the optimizer.

    Attributes:
        title: for tables.
        link: from (rho, number of steps, key) to the link.
        gradients: per step; None: it is counted while training.
        micro_batches: M, or the number of examples where there is one ascent for each.
        epochs: relative to those of the setting.
        has_rho: whether there is a rho to tune.
    """

    title: str
    link: Callable[[jax.Array, int, jax.Array], optax.GradientTransformation]
    gradients: float | None = 2
    micro_batches: int | None = 1
    epochs: int = 1
    has_rho: bool = True


def _late(share: float) -> Method:
    return Method(
        f"late SAM, last {share:.0%}",
        lambda rho, steps, key: optax_sam.late(optax_sam.sam(rho), steps - round(share * steps)),
        gradients=1 + share,
    )


def _msam(title: str, micro_batches: int | None) -> Method:
    return Method(title, lambda rho, steps, key: optax_sam.sam(rho), micro_batches=micro_batches)


def _falling(steps: int) -> optax.Schedule:
    return optax.linear_schedule(1.0, -1.0, steps)


# What a recipe has beside rho is what its paper, or else its docstring, recommends; the same in every setting.
METHODS = {
    "sgd": Method("SGD", lambda rho, steps, key: optax.identity(), 1, has_rho=False),
    "sgd_twice": Method("SGD, twice the epochs", lambda rho, steps, key: optax.identity(), 2, epochs=2, has_rho=False),
    "random": Method("random direction", lambda rho, steps, key: optax_sam.random_sam(rho, key), 1),
    "momentum_sam": Method("Momentum-SAM (−v)", lambda rho, steps, key: optax_sam.momentum_sam(rho), 1),
    "lagged_sam": Method("its opposite (+v)", lambda rho, steps, key: optax_sam.lagged_sam(rho), 1),
    "late_10": _late(0.10),
    "every_5": Method("SAM every 5th step", lambda rho, steps, key: optax_sam.sam_every(rho, 5), 1.2),
    "look_sam": Method("LookSAM, k = 5", lambda rho, steps, key: optax_sam.look_sam(rho, 5), 1.2),
    "late_25": _late(0.25),
    "ae_sam": Method("AE-SAM", lambda rho, steps, key: optax_sam.ae_sam(rho, _falling(steps)), None),
    "late_50": _late(0.50),
    "sam": Method("SAM", lambda rho, steps, key: optax_sam.sam(rho)),
    "usam": Method("USAM", lambda rho, steps, key: optax_sam.usam(rho)),
    "asam": Method("ASAM", lambda rho, steps, key: optax_sam.asam(rho)),
    "stable_sam": Method("StableSAM", lambda rho, steps, key: optax_sam.stable_sam(rho)),
    "friendly_sam": Method("Friendly SAM", lambda rho, steps, key: optax_sam.friendly_sam(rho)),
    "vasso": Method("VaSSO", lambda rho, steps, key: optax_sam.vasso(rho)),
    "gsam": Method("GSAM, α = 0.2", lambda rho, steps, key: optax_sam.gsam(rho, 0.2)),
    "wsam": Method("WSAM, γ = 0.7", lambda rho, steps, key: optax_sam.wsam(rho, 0.7)),
    "msam_4": _msam("mSAM, M = 4", 4),
    "msam_8": _msam("mSAM, M = 8", 8),
    "msam_16": _msam("mSAM, M = 16", 16),
    "msam_each": _msam("mSAM, one ascent for each example", None),
}
CONTROLS = ("sgd", "sgd_twice", "random")
FEW = ("sgd", "sgd_twice", "random", "late_25", "look_sam", "sam", "asam", "stable_sam", "msam_8", "msam_each")
