"""Importing the package is cheap, and needs neither DeepSpeed nor Megatron nor Triton."""

import subprocess
import sys


def run_python(code):
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return finished.stdout.strip()


def test_import_takes_less_than_a_second_beyond_torch_and_stays_light():
    code = (
        "import torch, sys, time; start = time.perf_counter(); import gigatok_ds; "
        "spent = time.perf_counter() - start; "
        "heavy = [m for m in ('deepspeed', 'megatron', 'timm', 'webdataset', 'pydantic', 'triton') if m in "
        "sys.modules]; print(spent < 1, heavy)"
    )
    assert run_python(code) == "True []"


def test_public_names_work_without_training_packages():
    code = (
        "import sys; sys.modules['deepspeed'] = sys.modules['megatron'] = None; "
        "sys.modules['webdataset'] = sys.modules['pydantic'] = sys.modules['timm'] = sys.modules['triton'] = None; "
        "import gigatok_ds; print(gigatok_ds.load_tokenizer.__name__, gigatok_ds.load_gpt.__name__, "
        "gigatok_ds.generate.__name__)"
    )
    assert run_python(code) == "load_tokenizer load_gpt generate"


def test_help_is_answered_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None; "
        "from gigatok_ds.cli.main import build_parser; print('convert' in build_parser().format_help())"
    )
    assert run_python(code) == "True"
