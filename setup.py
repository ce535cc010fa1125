"""Install gigatok_ds: `pip install .` for inference, `pip install '.[train]'` to train, `.[test]` for everything."""

from setuptools import find_packages, setup

TRAIN = [
    # Private interfaces of these two are relied on and tested: other versions need the tests run again.
    "deepspeed==0.19.8",
    "megatron-core==0.16.1",
    "webdataset>=1.0",
    "torchvision",
    "timm>=1.0.20",
    "lpips>=0.1.4",
    "tensorboard",
]
EVAL = ["scikit-learn>=1.5", "matplotlib>=3.8", "jinja2"]

setup(
    name="gigatok_ds",
    version="0.1.0",
    description="DeepSpeed training for GigaTok: 1D visual tokenizers and autoregressive image generators",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["gigatok_ds", "gigatok_ds.*"]),
    package_data={"gigatok_ds": ["recipes/*.yaml", "demo/*.html", "demo/*.css"]},
    install_requires=["torch>=2.11", "numpy", "pyyaml", "safetensors", "pydantic>=2.7", "pillow", "tqdm"],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "demo": TRAIN + EVAL,
        "test": TRAIN + EVAL + ["pytest>=8"],
    },
    entry_points={"console_scripts": ["gigatok-ds = gigatok_ds.cli.main:main"]},
)
