r"""Rounding: w + ε in dtypes whose spacing is wider than ε.

bfloat16 numbers near 1 are 2⁻⁷ apart, and a usual ε is a thousandth of that: rounded to nearest, w + ε would be w and
the SAM gradient the clean one. So the sum is rounded down or up at random, with probabilities that keep its mean:

.. math::
    \mathbb{E} [\mathrm{round}(w + \varepsilon)] = w + \varepsilon

The randomness is a hash of w, w + ε and the place in the leaf: no key, no state, and the same on all devices.
"""

import functools

import jax
import jax.numpy as jnp

from optax_sam._norms import widen


def rounded_sum(param: jax.Array, step: jax.Array) -> jax.Array:
    """param + step in the dtype of the param; its derivative is that of the exact sum."""
    dtype = param.dtype
    if jnp.finfo(dtype).bits >= 32:
        return param + step.astype(dtype)
    exact = widen(param) + widen(step).astype(jnp.float32)
    return _rounded(exact, _hash_uniform(widen(param), exact), dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _rounded(exact: jax.Array, uniform: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds float32 numbers up where ``uniform`` is below their distance from the lower neighbour, in spacings."""
    steps = exact / _spacing(exact, dtype)
    down = jnp.floor(steps)
    return (jnp.where(uniform < steps - down, down + 1, down) * _spacing(exact, dtype)).astype(dtype)


@_rounded.defjvp
def _straight_through(dtype: jnp.dtype, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # Rounding is flat or steep, never useful: straight through it goes the derivative of the exact sum.
    return _rounded(*primals, dtype), tangents[0].astype(dtype)


def _spacing(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The distance between neighbours in the dtype around float32 numbers, a power of two."""
    info = jnp.finfo(dtype)
    lowest = max(info.minexp, jnp.finfo(jnp.float32).minexp + info.nmant)  # float32 holds no smaller power of two
    exponent = ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127
    bits = (jnp.maximum(exponent, lowest) - info.nmant + 127) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _hash_uniform(x: jax.Array, y: jax.Array) -> jax.Array:
    """A number in [0, 1) for each pair of float32 elements and its place."""
    place = jnp.zeros_like(x, jnp.uint32)  # without it, leaves of equal elements would be rounded all up or all down
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ jax.lax.bitcast_convert_type(y, jnp.uint32)) + place * jnp.uint32(0x27D4EB2F)
    # The finalizer of MurmurHash3: each bit that goes in changes every bit that comes out with probability 1/2.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)  # float32 holds 24 bits: 1 does not come out
