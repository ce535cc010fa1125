"""Each change of another library is needed still, and helps. A failure here says which may go.

What takes a fresh process is slow: `-m slow` after a library's version has changed.
"""

import subprocess
import sys
from multiprocessing import connection
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler

from gigatok_ds import compat


def imported_with(statement):
    """Whether a process that runs the statement has wandb imported then."""
    script = f"{statement}\nimport sys; print('wandb' in sys.modules)"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True,
                          check=True).stdout.endswith("True\n")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "megatron.core.tensor_parallel"])
def test_libraries_import_wandb_unless_it_is_hidden(library):
    pytest.importorskip("wandb")
    assert imported_with(f"import {library}")
    assert not imported_with(f"from gigatok_ds.compat import without_wandb\nwith without_wandb(): import {library}")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without GPUs")
def test_megatron_asks_for_a_gpu_that_is_not_there():
    """In a process of its own, since the layers of this one's other tests may have been answered already."""
    script = """
import sys, torch
from torch import distributed as dist
if sys.argv[1] == "answered":
    from gigatok_ds.compat import current_device_without_gpus
    current_device_without_gpus()
from megatron.core import parallel_state, tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(1, create_gloo_process_groups=False)
tensor_parallel.ColumnParallelLinear(4, 4, config=ModelParallelConfig(perform_initialization=False),
                                     init_method=torch.nn.init.zeros_, gather_output=False)
"""
    codes = {how: subprocess.run([sys.executable, "-W", "ignore", "-c", script, how], capture_output=True,
                                 check=False).returncode for how in ("asked", "answered")}
    assert codes["asked"] != 0 and codes["answered"] == 0


def test_torch_gives_up_compiling_earlier_than_networks_need():
    from torch._dynamo import config

    assert config._config["recompile_limit"].default < 128
    with config.patch(recompile_limit=8):
        compat.compiled_versions(128)
        assert config.recompile_limit == 128


def test_sockets_of_multiprocessing_are_files_by_themselves(monkeypatch, tmp_path):
    monkeypatch.setattr(connection, "arbitrary_address", connection.arbitrary_address)
    assert connection.arbitrary_address("AF_UNIX").startswith("/")
    compat.sockets_without_files()
    with connection.Listener() as listener:
        assert bytes(listener.address).startswith(b"\0gigatok-ds-")


@pytest.mark.slow
def test_deepspeed_takes_a_shared_memory_op_for_compatible():
    script = "import deepspeed; print(deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'])"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True,
                          check=True).stdout.endswith("True\n")


def test_deepspeed_ends_a_search_for_a_loss_scale_with_a_traceback(monkeypatch):
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    scaler = loss_scaler.DynamicLossScaler(init_scale=1.0, scale_window=1000, min_scale=1, delayed_shift=1,
                                           consecutive_hysteresis=False)
    with pytest.raises(Exception, match="already at minimum"):
        scaler.update_scale(True)
    compat.search_at_lowest_scale(SimpleNamespace(loss_scaler=scaler))
    scaler.update_scale(True)
    assert scaler.cur_scale == 1
