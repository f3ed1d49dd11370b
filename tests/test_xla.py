"""What XLA:CPU needs from us, in the smallest programs: what fails here tells of a workaround to delete."""

import re

import jax
import jax.numpy as jnp
import pytest

import optax_sam

pytestmark = pytest.mark.heavy


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().as_text() or ""


def test_convolutions_in_loops_are_left_in_the_slow_layout():
    """See https://github.com/jax-ml/jax/issues/12868, and ``optax_sam/_convolution.py`` for what we do about it."""

    def loss(kernel, x):
        return jnp.sum(jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")))

    def in_a_loop(kernel, batches):
        return jax.lax.scan(lambda total, x: (total + jax.grad(loss)(kernel, x), None), kernel, batches)[0]

    kernel, x = jnp.ones((3, 2, 5)), jnp.ones((4, 8, 2))
    programs = compiled(jax.grad(loss), kernel, x), compiled(in_a_loop, kernel, jnp.stack([x, x, x]))
    layouts = [re.findall(r"dim_labels=(\S+?)[,\s]", program) for program in programs]
    assert set(layouts[0]) == {"b0f_0io->b0f"}
    assert "f0b_i0o->0bf" in layouts[1]


def test_without_a_wall_the_norm_is_repeated_in_the_pass_over_each_leaf():
    """See ``_squares`` in ``optax_sam/_norms.py``, where a branch is the wall."""

    def without_a_wall(leaves):
        first = sum(jnp.sum(leaf * leaf) for leaf in leaves)
        scale, fits = jnp.where(first < 1, 2.0**62, 2.0**-64), (first > 2.0**-60) & (first < 2.0**126)
        square = jnp.where(fits, first, sum(jnp.sum((leaf * scale) ** 2) for leaf in leaves))
        return jnp.sqrt(square) / jnp.where(fits, 1, scale)

    def instructions(norm, num_leaves):
        gradient_at = jax.grad(lambda leaves: sum(jnp.sum(jnp.sin(leaf) ** 2) for leaf in leaves))

        def stable_sam(leaves):
            length = norm(clean := gradient_at(leaves))
            gradient = gradient_at([leaf + g / length for leaf, g in zip(leaves, clean, strict=True)])
            return [g * length / norm(gradient) for g in gradient]

        return compiled(stable_sam, [jnp.ones(7 + index % 4) for index in range(num_leaves)]).count(" = ")

    assert instructions(without_a_wall, 32) > 6 * instructions(without_a_wall, 8)
    assert instructions(optax_sam.norm, 32) < 4.5 * instructions(optax_sam.norm, 8)
