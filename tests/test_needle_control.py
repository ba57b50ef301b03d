"""The needles' positive control: what was trained to recall finds them where it can see them."""

import importlib.util
from pathlib import Path

from ttt import evaluate, train
from ttt.config import compose, resolve
from ttt.core import compiling

PATH = Path(__file__).parents[1] / "tools" / "needle_control.py"


def test_needles_are_found_in_all_of_full_attentions_context_and_within_the_window(
    tmp_path, monkeypatch
):
    # Many steps: here LLVM's optimisations save more time than they take.
    fast = compiling.options() | {"xla_backend_optimization_level": 1}
    monkeypatch.setattr(compiling, "options", lambda: fast)
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.make_store(tmp_path)
    for method in tool.METHODS:
        own = [*tool.overrides(tmp_path, method), "backend.compilation_cache_dir=''"]
        config = resolve(compose(own))
        train.run(config)
    assert evaluate.run(config) is None
    shares = tool.found(tmp_path)
    assert shares["fa"] >= 0.95
    assert shares["swa, in sight"] >= 0.95
    assert shares["swa, beyond"] <= 0.15  # chance: one in 54 numbers
