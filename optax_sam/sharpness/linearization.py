"""The Gauss-Newton matrix: the Hessian of a loss whose network is replaced by its tangent."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_sam.sharpness.streaming import LossFn


def gauss_newton(outputs_fn: Callable[[Any, Any], Any], loss_of_outputs: Callable[[Any, Any], jax.Array]) -> LossFn:
    r"""A loss function whose value and gradient are those of L, and whose Hessian is the Gauss-Newton matrix.

    .. math::
        L(w) = \ell(f(w)), \qquad G = J^T \, \nabla^2 \ell \, J, \qquad J = \partial f / \partial w

    For every instrument in place of the loss, such as ``hessian_eigenvalues(gauss_newton(outputs_fn, loss_fn), params,
    batches)``. Where the loss is convex in the outputs, as cross-entropy and squares are, G has no negative
    eigenvalue; for cross-entropy it is the Fisher matrix. What is left of H is the curvature of the network itself.
    Make it once: instruments compile for each loss function.

    Args:
        outputs_fn: ``outputs_fn(params, batch)`` → outputs of the network, a tree.
        loss_of_outputs: ``loss_of_outputs(outputs, batch)`` → mean loss of the batch.

    Returns:
        ``loss_fn(params, batch)``.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = gauss_newton(lambda w, x: x * w**2, lambda outputs, x: jnp.mean((outputs - 1) ** 2) / 2)
        >>> print(jax.grad(loss_fn)(2.0, jnp.ones(4)), jax.hessian(loss_fn)(2.0, jnp.ones(4)))  # H = 22
        12.0 16.0

    Reference:
        Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent
        <https://doi.org/10.1162/08997660260028683>`_, 2002
    """

    def loss_fn(params, batch):
        point = jax.lax.stop_gradient(params)
        step = optax.tree.sub(params, point)  # zero, but not for derivatives
        outputs, change = jax.jvp(lambda w: outputs_fn(w, batch), (point,), (step,))
        return loss_of_outputs(jax.tree.map(_changed, outputs, change), batch)

    return loss_fn


def _changed(output: jax.Array, change: jax.Array) -> jax.Array:
    return output if change.dtype == jax.dtypes.float0 else output + change  # of integers
