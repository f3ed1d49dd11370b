"""Masks: which leaves of the params move, for the ``mask`` of the recipes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def normalization_layers(params: Any) -> Any:
    """The scales and biases of normalization layers: as ``mask`` of a recipe, this is SAM-ON.

    A layer is one of a class whose name holds "Norm" (Equinox), or an entry whose name does or that holds nothing but
    ``scale`` and ``bias`` (Flax, Linen and NNX).

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
        is_layer = _is_layer(node) or any("norm" in _name(key).lower() for key in path)
        return jax.tree.map(lambda _: is_layer, node)

    mask = jax.tree.map_with_path(chosen, params, is_leaf=_is_layer)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("normalization_layers(params) found none: no name holds 'norm'. Pass a mask of your own.")
    return mask


def no_vectors(params: Any) -> Any:
    """Leaves of two axes or more: neither biases nor the scales of normalization layers.

    Args:
        params: the params of a model.

    Returns:
        A tree of booleans with the structure of the params.

    Example:
        >>> print(no_vectors({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}))
        {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _is_layer(node: Any) -> bool:
    if isinstance(node, Mapping):
        return "scale" in node and set(node) <= {"scale", "bias"}
    return "Norm" in type(node).__name__


def _name(key: Any) -> str:
    """The name in an entry of a path: of a dict, or of an attribute."""
    return str(getattr(key, "key", getattr(key, "name", "")))
