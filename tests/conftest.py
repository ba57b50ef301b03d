"""Strictest settings for every test, and where the golden values lie."""

import functools
import gc
import logging
import os
import runpy
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite's time is that of compiling, and small programs run well without LLVM's optimisations.
# Golden losses and gradients are checked with them (tests/test_golden.py).
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
)

import jax
import omegaconf._utils
import omegaconf.base
import pytest
from golden import folder

pytest_plugins = ["skips"]

# Compiled programs are shared by the workers of one run and by later runs.
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("TTT_TEST_CACHE", str(Path(tempfile.gettempdir()) / "ttt-test-cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compose hundreds of configurations, and half the time of that is spent on parsing the same
# few interpolations again.
omegaconf.base.parse = omegaconf._utils.parse = functools.cache(omegaconf.base.parse)
# Tracing makes many small objects and no cycles worth looking for so often.
gc.set_threshold(50_000)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden values: the full set where there is one, else the trimmed one."""
    return folder()


@pytest.fixture
def float64():
    """Arrays of the test are float64 by default."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def handlers_stay_open(monkeypatch):
    """Hydra sets logging up anew, which closes every handler there is; absl's closes its stream.

    That stream is whatever stderr was when absl was imported: in a test, pytest's own capture.
    """
    monkeypatch.setattr(logging, "shutdown", lambda *handlers: None)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """(exit code, what was said) of `scripts/NAME` called with these arguments."""

    def run(name, *arguments):
        path = str(Path(__file__).parents[1] / "scripts" / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as exited:
            code = exited.code or 0
        return code, capsys.readouterr()

    return run
