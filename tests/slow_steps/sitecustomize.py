"""On PYTHONPATH, this makes every training step of a process wait for half a second."""

import importlib.util
import sys
import time


class _Waiting:
    """Wraps `ttt.training.steps.is_good`, which is called once a step, when it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "ttt.training.steps":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            is_good = module.is_good
            module.is_good = lambda metrics: time.sleep(0.5) or is_good(metrics)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Waiting())
