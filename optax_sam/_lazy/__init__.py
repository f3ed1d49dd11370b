"""Lazy evaluation: means over micro-batches in which gradients of weights stay outer products.

``outer`` is the arithmetic of such products and ``grams`` that of their norms. ``interpreter`` evaluates the program of
one micro-batch for all of them, on ``values``, by the rules in ``layers``, ``elementwise`` and ``branches``. ``plan``
tells whether that pays, and ``mean`` is the way in.
"""

from optax_sam._lazy.mean import lazy_mean

__all__ = ["lazy_mean"]
