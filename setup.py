"""The build of the native kernels; everything else about the package is in pyproject.toml.

The quantizer's native kernels are compiled when first needed, or here if torch can be imported while building:
`pip install --no-build-isolation .` does that where there is a compiler, for GPUs, too, where there is a CUDA toolkit.
GIGATOK_BUILD_CUDA=1 insists on CUDA kernels, GIGATOK_BUILD_CUDA=0 leaves them out. An editable install compiles
nothing.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

INSISTS = os.environ.get("GIGATOK_BUILD_CUDA") == "1"


def kernel_builder():
    """gigatok_ds/kernels/build.py as a module, without the package and what that imports."""
    path = Path(__file__).parent / "gigatok_ds" / "kernels" / "build.py"
    specification = importlib.util.spec_from_file_location("kernel_builder", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def kernels_can_be_built() -> bool:
    return bool(importlib.util.find_spec("torch")) and not kernel_builder().obstacles()


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        if kernels_can_be_built():
            self.build_kernels(kernel_builder())
        elif INSISTS:
            sys.exit("GIGATOK_BUILD_CUDA=1 needs torch, a C++ compiler, ninja and a CUDA toolkit while building: "
                     "pip install --no-build-isolation .")

    def build_kernels(self, builder):
        import torch

        with_cuda = INSISTS or bool(os.environ.get("GIGATOK_BUILD_CUDA") != "0" and torch.version.cuda
                                    and builder.toolkit())
        folder = Path(self.build_lib) / "gigatok_ds" / "kernels" / builder.PREBUILT.name
        self.mkpath(str(folder))
        for cuda in (True, False) if with_cuda else (False,):
            said = builder.compile_apart((folder / builder.library_name(cuda)).resolve(), cuda)
            if not said:
                return
            print(said, file=sys.stderr)
            if INSISTS:
                sys.exit("GIGATOK_BUILD_CUDA=1, but compiling the CUDA kernels failed")
        print("the kernels did not compile; gigatok-ds works without them", file=sys.stderr)


class PlatformDistribution(Distribution):
    """Its wheel is for one platform when it holds compiled kernels."""

    def has_ext_modules(self):
        return kernels_can_be_built()


setup(cmdclass={"build_py": BuildWithKernels}, distclass=PlatformDistribution)
