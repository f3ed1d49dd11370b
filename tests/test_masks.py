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
        x = nn.Dense(4, name="PreNormBlock_0")(nn.GroupNorm(num_groups=2, name="groups")(x))
        return nn.Dense(2, name="normal_head")(x)


class PreNorm(eqx.Module):
    """A block whose name holds "Norm" and that is none."""

    inner: eqx.nn.Linear
    norm: eqx.nn.RMSNorm


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
    layers.append(PreNorm(layers[0], eqx.nn.RMSNorm(4)))
    return eqx.filter(eqx.nn.Sequential(layers), eqx.is_inexact_array)


# The params of a model, and the paths of what its normalization layers hold.
MODELS = {
    "linen": (linen_params, {"['LayerNorm_0']['bias']", "['groups']['scale']", "['groups']['bias']"}),
    "nnx": (
        lambda: nnx.state(NNX(nnx.Rngs(0)), nnx.Param),
        {"['bn']['scale']", "['bn']['bias']", "['layers'][0]['scale']"},
    ),
    "equinox": (
        equinox_params,
        {".layers[1].weight", ".layers[1].bias", ".layers[3].norm.weight", ".layers[3].norm.bias"},
    ),
    "plain": (lambda: {"scale": jnp.ones(2), "w": jnp.ones((2, 2)), "n": {"scale": jnp.ones(2)}}, {"['n']['scale']"}),
    "all that is held": (
        lambda: {"norm": dict.fromkeys(("scale", "weight", "bias"), jnp.ones(2)), "other": {"weight": jnp.ones(2)}},
        {f"['norm']['{name}']" for name in ("scale", "weight", "bias")},
    ),
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


def test_vectors_are_left_out():
    assert chosen(optax_sam.no_vectors(linen_params())) == {
        f"['{name}']['kernel']" for name in ("Dense_0", "PreNormBlock_0", "normal_head")
    }
    assert chosen(optax_sam.no_vectors(MODELS["plain"][0]())) == {"['w']"}


def test_as_the_mask_of_a_recipe_the_other_leaves_stay():
    params = linen_params()
    seen = []

    def grad_fn(point):
        seen.append(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), point, params))
        return jax.tree.map(jnp.ones_like, point)

    link = optax_sam.sam(0.5, mask=optax_sam.normalization_layers)
    link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)
    assert seen[1] == optax_sam.normalization_layers(params)
