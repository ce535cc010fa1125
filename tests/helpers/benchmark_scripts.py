"""The scripts of benchmarks/ as modules."""

import contextlib
import importlib.util
import sys

from places import ROOT

BENCHMARKS = ROOT / "benchmarks"


@contextlib.contextmanager
def loaded(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(BENCHMARKS))  # as for a script: its neighbours are modules
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        del sys.modules[name]
