"""Masks: which leaves of the params move, for the ``mask`` of the recipes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._checks import spread_mask

Mask = Any | Callable[[optax.Params], Any]
HELD = {"scale", "weight", "bias"}  # by normalization layers


def normalization_layers(params: Any) -> Any:
    """The scales and biases of normalization layers: as ``mask`` of a recipe, this is SAM-ON.

    Such a layer holds nothing but ``scale``, ``weight`` and ``bias``, and "norm" is in its name or in that of its
    class; or it holds a ``scale`` and at most a ``bias``, as those of Flax do whatever their name.

    Args:
        params: the params of a model.

    Returns:
        A tree of booleans with the structure of the params.

    Raises:
        ValueError: there is no such layer: nothing would move.

    Example:
        >>> from optax_sam import masks, sam
        >>> params = {"dense": {"kernel": jnp.ones((2, 2))}, "LayerNorm_0": {"scale": jnp.ones(2)}}
        >>> print(masks.normalization_layers(params))
        {'LayerNorm_0': {'scale': True}, 'dense': {'kernel': False}}
        >>> link = sam(rho=0.5, mask=masks.normalization_layers)

    Reference:
        Müller et al., `Normalization Layers Are All That Sharpness-Aware Minimization Needs
        <https://arxiv.org/abs/2306.04226>`_, 2023
    """

    def chosen(path, node):
        name = _name(path[-1]) if path and isinstance(node, Mapping) else type(node).__name__
        has_scale = isinstance(node, Mapping) and "scale" in node
        is_layer = _may_be_layer(node) and ("norm" in name.lower() or has_scale)
        return jax.tree.map(lambda _: is_layer, node)

    mask = jax.tree.map_with_path(chosen, params, is_leaf=_may_be_layer)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("normalization_layers(params) found none: no name holds 'norm'. Pass a mask of your own.")
    return mask


def no_vectors(params: Any) -> Any:
    """Leaves of two axes or more: neither biases nor the scales of normalization layers.

    Of layers that are stacked, as for ``nn.scan``, vectors have two axes and are taken for matrices.

    Args:
        params: the params of a model.

    Returns:
        A tree of booleans with the structure of the params.

    Example:
        >>> print(no_vectors({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}))
        {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def restricted(ascent: optax.GradientTransformation, mask: Mask | None) -> optax.GradientTransformation:
    """The ascent of the leaves that mask chooses; the others stay where they are."""
    if mask is None:
        return ascent
    if isinstance(mask, (bool, np.bool_, np.ndarray, jax.Array)):
        raise TypeError(f"mask is {mask!r}, as inject_hyperparams makes of a function. Pass static_args='mask' there.")

    def keep(updates, params):
        return jax.tree.map(lambda chosen, g: _kept(chosen, jnp.asarray(g)), spread_mask(mask, params), updates)

    return optax.chain(optax.stateless(keep), ascent)


def _kept(chosen: bool | jax.Array, leaf: jax.Array) -> jax.Array:
    if isinstance(chosen, jax.Array):
        return jnp.where(chosen, leaf, 0)
    return leaf if chosen else jnp.zeros_like(leaf)  # known when traced: nothing to select


def _may_be_layer(node: Any) -> bool:
    """Whether a node holds nothing but what a normalization layer does."""
    if isinstance(node, Mapping):
        return bool(node) and set(node) <= HELD and not any(isinstance(child, Mapping) for child in node.values())
    paths = [path for path, _ in jax.tree.leaves_with_path(node)]
    return bool(paths) and all(len(path) == 1 and _name(path[0]) in HELD for path in paths)


def _name(key: Any) -> str:
    """The name in an entry of a path: of a dict, or of an attribute."""
    return str(getattr(key, "key", getattr(key, "name", "")))
