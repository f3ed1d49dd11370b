"""The suite runs on eight CPU devices, compiles in a hurry, and draws the same random inputs every time."""

import gc
import os

import jaxlib

# XLA takes most of the suite's time. Set XLA_FLAGS to something else, or to nothing, for programs as users get them.
hurry = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jaxlib.version.__version_info__ < (0, 12):
    hurry += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(hurry))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("fixed")


def pytest_collection_finish():
    gc.freeze()  # of what is imported by now, nothing will ever be garbage


@pytest.fixture
def compilations():
    """The programs that are compiled, as it happens."""
    found = []
    listener = lambda event, duration, **details: found.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    jax.jit(lambda: 0)()
    assert found, "the event has another name by now"
    found.clear()
    yield found
    jax.monitoring.unregister_event_duration_listener(listener)
