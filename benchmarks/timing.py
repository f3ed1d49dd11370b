"""Timing on noisy machines: warm-up, interleaved repeats, medians and ratios; and what stood under the numbers."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jaxlib
import numpy as np
import optax
import tqdm

import optax_sam


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each call, (repeats,) per function: all functions once, then all again, after a call to warm up."""
    for function in tqdm.tqdm(functions.values(), desc="compiling", disable=None, leave=False):
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in tqdm.trange(repeats, desc="timing", disable=None, leave=False):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, np.ndarray], baseline: str) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of the time of each function relative to the baseline's in the same round."""
    table = {}
    for name, values in seconds.items():
        low, median, high = np.percentile(values / seconds[baseline], (25, 50, 75)).tolist()
        table[name] = median, low, high
    return table


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "versions": {module.__name__: module.__version__ for module in (jax, jaxlib, optax, optax_sam)},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
    }
