"""Small networks for image classification, without BatchNorm.

BatchNorm would tie the examples of a micro-batch together and keep statistics that the perturbed pass must not see;
GroupNorm does neither.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Two hidden layers."""

    width: int = 128
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.num_classes)(x)


class CNN(nn.Module):
    """Three 3×3 convolutions, each at half the resolution of the one before."""

    widths: Sequence[int] = (32, 64, 64)
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class ResidualBlock(nn.Module):
    """Pre-activation: (GroupNorm, ReLU, 3×3 convolution) twice, added to the input."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.GroupNorm(num_groups=8)(x))
        if self.stride > 1 or x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(y)
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(y)
        y = nn.relu(nn.GroupNorm(num_groups=8)(y))
        return x + nn.Conv(self.width, (3, 3), use_bias=False)(y)


class ResNet(nn.Module):
    """Pre-activation residual network with GroupNorm; depth 6n + 2 for n blocks a stage, 14 by default."""

    widths: Sequence[int] = (16, 32, 64)
    blocks: int = 2
    stem_stride: int = 1
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), self.stem_stride, use_bias=False)(images)
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                x = ResidualBlock(width, stride=2 if stage and not block else 1)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x)).mean(axis=(1, 2))
        return nn.Dense(self.num_classes)(x)


MODELS = {"mlp": MLP, "cnn": CNN, "resnet": ResNet}
