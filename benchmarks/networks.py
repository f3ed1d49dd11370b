"""The networks of the benchmarks: dense, convolutional, residual and attention, as fixed tasks on random data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Batch = tuple[jax.Array, jax.Array]


class MLP(nn.Module):
    """784-1024-1024-10."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(1024, dtype=self.dtype)(x))
        return nn.Dense(10, dtype=self.dtype)(x)


class CNN(nn.Module):
    """3×3 convolutions of 32, 64 and 64 channels, each followed by pooling."""

    dtype: Any = jnp.float32
    widths: Sequence[int] = (32, 64, 64)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for width in self.widths:
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype)(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10, dtype=self.dtype)(x.reshape(len(x), -1))


class ResNet(nn.Module):
    """Pre-activation residual network with GroupNorm, of depth 8: one block of each width."""

    dtype: Any = jnp.float32
    widths: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        def convolution(width, size=3, stride=1):
            return nn.Conv(width, (size, size), stride, use_bias=False, dtype=self.dtype)

        def activation(x):
            return nn.relu(nn.GroupNorm(num_groups=8, dtype=self.dtype)(x))

        x = convolution(self.widths[0])(images)
        for stage, width in enumerate(self.widths):
            stride = 2 if stage else 1
            y = activation(x)
            shortcut = convolution(width, size=1, stride=stride)(y) if stage else x
            y = convolution(width, stride=stride)(y)
            x = shortcut + convolution(width)(activation(y))
        return nn.Dense(10, dtype=self.dtype)(activation(x).mean(axis=(1, 2)))


class Transformer(nn.Module):
    """Causal language model: pre-norm blocks of attention with 4 heads and a 4-fold hidden layer, no dropout."""

    dtype: Any = jnp.float32
    width: int = 128
    layers: int = 2
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(tokens)
        positions = nn.Embed(tokens.shape[1], self.width)(jnp.arange(tokens.shape[1]))
        x = nn.Embed(self.vocabulary, self.width)(tokens) + positions[None]
        for _ in range(self.layers):
            y = nn.LayerNorm(dtype=self.dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4, dtype=self.dtype)(y, mask=mask)
            y = nn.LayerNorm(dtype=self.dtype)(x)
            y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(y))
            x = x + nn.Dense(self.width, dtype=self.dtype)(y)
        return nn.Dense(self.vocabulary, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


class Task(NamedTuple):
    """A network and a batch for it."""

    model: Any
    batch_shape: tuple[int, ...]

    @property
    def has_tokens(self) -> bool:
        return len(self.batch_shape) == 2

    def batch(self) -> Batch:
        """Random images and labels, or random tokens and the next ones; both with a leading axis of examples."""
        if not self.has_tokens:
            images = jax.random.normal(jax.random.key(0), self.batch_shape)
            return images, jnp.arange(len(images)) % 10
        tokens = jax.random.randint(jax.random.key(0), self.batch_shape, 0, self.model.vocabulary)
        return tokens, jnp.roll(tokens, -1, axis=1)

    def init(self) -> Any:
        return self.model.init(jax.random.key(1), self.batch()[0][:1])

    def loss_fn(self, params: Any, batch: Batch) -> jax.Array:
        inputs, labels = batch
        logits = jnp.asarray(self.model.apply(params, inputs)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def tasks(dtype: Any = jnp.float32) -> dict[str, Task]:
    """The tasks, with activations in a dtype; params are float32."""
    return {
        "MLP": Task(MLP(dtype), (512, 28, 28, 1)),
        "CNN": Task(CNN(dtype), (128, 32, 32, 3)),
        "ResNet": Task(ResNet(dtype), (128, 32, 32, 3)),
        "transformer": Task(Transformer(dtype), (32, 64)),
        "transformer of width 256, 16 tokens": Task(Transformer(dtype, width=256), (32, 16)),
        "transformer of width 256, 64 tokens": Task(Transformer(dtype, width=256), (32, 64)),
    }
