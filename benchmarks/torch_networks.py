"""The networks of ``networks.py`` in PyTorch, layer for layer."""

# pyright: reportMissingImports=false

import functools

import torch
from torch import nn


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def cnn() -> nn.Module:
    layers, channels = [], 3
    for width in (32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4 * 64, 10))


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.GroupNorm(8, channels), nn.GroupNorm(8, width)
        self.first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first_norm(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.second(torch.relu(self.second_norm(self.first(y))))


def resnet() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for width in (16, 32, 64):
        layers.append(Block(channels, width, stride=1 if width == 16 else 2))
        channels = width
    head = [nn.GroupNorm(8, channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers, *head)


class Transformer(nn.Module):
    def __init__(self, width: int = 128, layers: int = 2, vocabulary: int = 256, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        options = {"dropout": 0.0, "activation": nn.functional.gelu, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 4 * width, **options) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


NETWORKS = {
    "MLP": mlp,
    "CNN": cnn,
    "ResNet": resnet,
    "transformer": Transformer,
    "transformer of width 256, 16 tokens": functools.partial(Transformer, 256, length=16),
    "transformer of width 256, 64 tokens": functools.partial(Transformer, 256),
}


def make(name: str) -> nn.Module:
    """A network with random weights."""
    return NETWORKS[name]()
