"""Install gigatok_ds: `pip install .` for inference, `pip install '.[train]'` to train, `.[test]` for everything.

The quantizer's native kernels are compiled when first needed, or here if torch can be imported while building:
`pip install --no-build-isolation .` does that where there is a compiler, for GPUs, too, where there is a CUDA toolkit.
GIGATOK_BUILD_CUDA=1 insists on CUDA kernels, GIGATOK_BUILD_CUDA=0 leaves them out. An editable install compiles nothing.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
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


TRAIN = [
    # Private interfaces of these two are relied on and tested: other versions need the tests run again.
    "deepspeed==0.19.8",
    "megatron-core==0.16.1",
    "webdataset>=1.0",
    "braceexpand",
    "fsspec>=2023.5",
    "torchvision",
    "simplejpeg>=1.8",
    "timm>=1.0.20",
    "lpips>=0.1.4",
    "scipy",
    "tensorboard",
]
HUB = ["huggingface_hub>=0.30"]
ONNX = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
APP = ["gradio>=6.31"]  # which of its addresses the page uses is in app/guard.py
EVAL = ["scikit-learn>=1.5", "scipy", "matplotlib>=3.8", "jinja2", "torch-fidelity>=0.4"]

setup(
    name="gigatok_ds",
    version="0.1.0",
    description="DeepSpeed training for GigaTok: 1D visual tokenizers and autoregressive image generators",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["gigatok_ds", "gigatok_ds.*"]),
    package_data={"gigatok_ds": ["recipes/*.yaml", "planning/*.json", "demo/*.html", "demo/*.css", "kernels/csrc/*"]},
    cmdclass={"build_py": BuildWithKernels},
    distclass=PlatformDistribution,
    install_requires=["torch>=2.11", "numpy", "pyyaml", "safetensors", "pydantic>=2.7", "pillow", "tqdm"],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "wandb": ["wandb"],
        "hub": HUB,
        "onnx": ONNX,
        "app": APP,
        "demo": TRAIN + EVAL,
        # scikit-image: the reference of SSIM, and most of the photographs of benchmarks/photographs.py.
        "test": TRAIN + EVAL + ["pytest>=8", "pytest-xdist>=3.7", "hypothesis>=6.100", "scikit-image>=0.22", "wandb",
                               "playwright>=1.50", *HUB, *ONNX, *APP],
    },
    entry_points={"console_scripts": ["gigatok-ds = gigatok_ds.cli.main:main"]},
)
