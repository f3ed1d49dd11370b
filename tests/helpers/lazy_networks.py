"""Small networks whose gradients are outer products, or are not: what the tests of lazy evaluation run over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

SIZE = 8  # examples in a batch


class Network(NamedTuple):
    """A loss, its params and a batch; the outputs that stay outer products, and for what others are multiplied out."""

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    weights: int
    users: frozenset[str] = frozenset()


def images(*shape: int) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(jax.random.key(0), (SIZE, *shape)), jnp.arange(SIZE) % 5


def tokens(length: int, vocabulary: int) -> jax.Array:
    return jax.random.randint(jax.random.key(0), (SIZE, length), 0, vocabulary)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def of_flax(model: nn.Module, inputs: Any, labels: Any, weights: int, users: Any = ()) -> Network:
    def loss_fn(params, batch):
        return cross_entropy(model.apply(params, batch[0]), batch[1])

    params = optax.tree.cast(model.init(jax.random.key(1), inputs[:1]), float)
    return Network(loss_fn, params, (inputs, labels), weights, frozenset(users))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (24, 24):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(16)(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(24)(nn.gelu(nn.Dense(48)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """Causal, one block, checkpointed or not, with an output layer of its own or the table of tokens again."""

    is_tied: bool = False
    is_checkpointed: bool = False

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(20, 24)
        x = table(x) + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 24))
        x = (nn.remat(Block) if self.is_checkpointed else Block)()(x)
        return table.attend(x) if self.is_tied else nn.Dense(20)(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (3, 3))(x))
        return nn.Dense(16)(x.reshape(len(x), -1))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.RNN(nn.SimpleCell(12, param_dtype=float))(x)[:, -1])


def with_dropout() -> Network:
    """A LayerNorm and dropout, whose key comes with each batch of one example or more."""
    network = of_flax(MLP(), *images(20), weights=3)

    def loss_fn(params, batch, key):
        x = nn.LayerNorm(use_scale=False, use_bias=False).apply({}, batch[0])
        x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0)
        return network.loss_fn(params, (x, batch[1]))

    return network._replace(loss_fn=loss_fn)


def of_equinox() -> Network:
    model = eqx.nn.MLP(20, 16, 24, depth=2, activation=jnp.tanh, key=jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, batch):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(batch[0]), batch[1])

    return Network(loss_fn, params, images(20), weights=3)


def of_complex_numbers() -> Network:
    real, imaginary = jax.random.normal(jax.random.key(1), (2, 20, 24))

    def loss_fn(params, batch):
        return jnp.mean(jnp.abs(batch[0] @ params) ** 2)

    return Network(loss_fn, real + 1j * imaginary, images(20), weights=0, users=frozenset({"imag", "mul", "real"}))


def with_weight_decay() -> Network:
    """The params themselves in the gradient, as the array that all micro-batches share."""
    network = of_flax(MLP(), *images(20), weights=3)

    def loss_fn(params, batch):
        return network.loss_fn(params, batch) + 0.05 * optax.tree.norm(params, squared=True)

    return network._replace(loss_fn=loss_fn)


def mlp() -> Network:
    return of_flax(MLP(), *images(20), weights=3)


def transformer(**options: Any) -> Network:
    x = tokens(3, 20)
    return of_flax(Transformer(**options), x, jnp.roll(x, -1, axis=1), weights=7 if options.get("is_tied") else 8)


NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": mlp,
    "weight decay": with_weight_decay,
    "transformer": transformer,
    "tied and checkpointed": lambda: transformer(is_tied=True, is_checkpointed=True),
    "equinox": of_equinox,
    "complex": of_complex_numbers,
    "cnn": lambda: of_flax(CNN(), *images(6, 6, 2), weights=1),
    "recurrent": lambda: of_flax(Recurrent(), *images(4, 10), weights=1),
}
