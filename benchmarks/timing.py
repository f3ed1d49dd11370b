"""Timing on noisy machines: warm-up, repeats in random order, medians and ratios; and what stood under the numbers."""

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

SHORTEST = 0.1  # seconds of one measurement: quicker functions are called several times
SLOW = 0.5  # seconds: up to here, what ran before is felt, so that a call goes ahead


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of a call, (repeats,) per function: all of them in random order, then all again, after calls to warm up.

    Medians of a fixed order would depend on the neighbour: one that leaves cold caches or unmapped memory costs the
    next 10 %.
    """
    durations = {}
    for name, function in tqdm.tqdm(functions.items(), desc="warming up", disable=None, leave=False):
        jax.block_until_ready(function())
        durations[name] = _seconds(function, 1)
    rng = np.random.default_rng(0)
    seconds = {name: [] for name in functions}
    for _ in tqdm.trange(repeats, desc="timing", disable=None, leave=False):
        for name in rng.permutation(list(functions)).tolist():
            function, duration = functions[name], durations[name]
            if duration < SLOW:
                jax.block_until_ready(function())
            seconds[name].append(_seconds(function, int(np.clip(SHORTEST / duration, 1, 200))))
    return {name: np.array(values) for name, values in seconds.items()}


def _seconds(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


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
