"""Masks of the params of models, in the trees of Flax Linen, Flax NNX and Equinox."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import optax_sam


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(use_scale=False)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.GroupNorm(num_groups=2, name="groups")(x))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.bn = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.RMSNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])


def linen_params():
    with jax.numpy_rank_promotion("allow"):
        return Linen().init(jax.random.key(0), jnp.ones((2, 3)))["params"]


def equinox_params():
    layers = [
        eqx.nn.Linear(3, 4, key=jax.random.key(0)),
        eqx.nn.LayerNorm(4),
        eqx.nn.Linear(4, 2, key=jax.random.key(1)),
    ]
    return eqx.filter(eqx.nn.Sequential(layers), eqx.is_inexact_array)


# The params of a model, and the paths of what its normalization layers hold.
MODELS = {
    "linen": (linen_params, {"['LayerNorm_0']['bias']", "['groups']['scale']", "['groups']['bias']"}),
    "nnx": (
        lambda: nnx.state(NNX(nnx.Rngs(0)), nnx.Param),
        {"['bn']['scale']", "['bn']['bias']", "['layers'][0]['scale']"},
    ),
    "equinox": (equinox_params, {".layers[1].weight", ".layers[1].bias"}),
    "plain": (lambda: {"scale": jnp.ones(2), "w": jnp.ones((2, 2)), "n": {"scale": jnp.ones(2)}}, {"['n']['scale']"}),
}


def chosen(mask):
    return {
        jax.tree_util.keystr(path).removesuffix(".value").removesuffix("[...]")
        for path, leaf in jax.tree.leaves_with_path(mask)
        if leaf
    }


@pytest.mark.parametrize("name", MODELS)
def test_normalization_layers_are_found(name):
    make, expected = MODELS[name]
    params = make()
    mask = optax_sam.normalization_layers(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert chosen(mask) == expected


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_left_out(name):
    params = MODELS[name][0]()
    mask = optax_sam.no_vectors(params)
    kept = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    assert all(isinstance(chosen, bool) and chosen == (leaf.ndim > 1) for leaf, chosen in kept)


def test_as_the_mask_of_a_recipe_the_other_leaves_stay():
    params = linen_params()
    seen = []

    def grad_fn(point):
        seen.append(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), point, params))
        return jax.tree.map(jnp.ones_like, point)

    link = optax_sam.sam(0.5, mask=optax_sam.normalization_layers)
    link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)
    assert seen[1] == optax_sam.normalization_layers(params)
