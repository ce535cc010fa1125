"""What ranks hold alike is compared bit for bit; what is not alike is named, with the rank that holds another."""

import pytest
import torch
from rank_runs import RanksFailed, run_ranks
from training_runs import prepare, start, train_with_faults

from gigatok_ds.checkpoint.run_directory import complete_checkpoints
from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.history import read_history
from gigatok_ds.parallel import drift
from gigatok_ds.parallel.topology import single_process
from gigatok_ds.resilience.fault_injection import parse_fault
from gigatok_ds.resilience.health import check_health


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    return folder, prepare(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool])
def test_a_checksum_sees_every_bit_and_place(dtype, monkeypatch):
    monkeypatch.setattr(drift, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 9, generator=generator).mul(10).to(dtype)
    total = drift.checksum(values)
    assert total == drift.checksum(values.clone()) and total.dtype == torch.int64
    if dtype != torch.bool:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
        for place in range(values.numel()):
            other = values.clone()
            other.view(kind).view(-1)[place] ^= 1
            assert drift.checksum(other) != total
    swapped = values.clone().view(-1)
    swapped[0] = ~swapped[1] if dtype == torch.bool else swapped[1] + 1
    values = swapped.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    total = drift.checksum(values)
    assert drift.checksum(swapped) != total
    monkeypatch.setattr(drift, "CHUNK", 1 << 22)
    assert drift.checksum(values) == total


def test_a_checksum_knows_not_a_number_and_signs_of_zero():
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.zeros(3)
    assert drift.checksum(nan) == drift.checksum(nan.clone())
    assert drift.checksum(zero) != drift.checksum(-zero) and drift.checksum(torch.zeros(0)) == 0
    assert drift.checksum(torch.zeros(3)) != drift.checksum(torch.zeros(4))


@pytest.mark.parametrize("kind, ranks, tensor_size, stage, fault, said", [
    ("gpt", 3, 1, 0, "drift:rank=2,step=3,tensor=norm.weight", "norm.weight"),
    ("tokenizer", 2, 1, 3, "drift:rank=1,step=3", "quantizer.codebook_used"),
    ("tokenizer", 2, 1, 1, "drift:rank=0,step=5,part=discriminator", "of the discriminator"),
    ("gpt", 2, 2, 0, "drift:rank=1,step=3,tensor=norm.weight", "should be alike on ranks 0 (host"),
])
def test_a_rank_that_drifts_is_named_before_anything_is_saved(data, tmp_path, kind, ranks, tensor_size, stage, fault,
                                                              said):
    folder, names = data
    out = tmp_path / "run"
    recipe = load_recipe(folder / f"{kind}.yaml", [*names[kind], f"parallel.tensor={tensor_size}", "checkpoint.every=2",
                                                   "training.global_batch_size=12", "training.steps=8"])
    with pytest.raises(RanksFailed, match="exit code 1"):
        run_ranks(train_with_faults, ranks, recipe, out, stage, [fault])
    failed, = [line for line in read_history(out) if line["event"] == "failed"]
    drifted = parse_fault(fault)
    assert said in failed["reason"] and "a link is faulty" in failed["reason"], failed
    assert f"step {drifted.step + 1}: of the " in failed["reason"]
    assert f"step-000000{drifted.step - 1}, which is from before" in failed["reason"]
    if ranks > 2:
        assert (
            f"on rank {drifted.rank} (host " in failed["reason"] and "is not what ranks 0, 1 hold" in failed["reason"]
        )
    assert complete_checkpoints(out)[-1][0] == drifted.step - 1


def test_it_is_looked_at_between_checkpoints(data, tmp_path):
    folder, names = data
    out = tmp_path / "run"
    recipe = load_recipe(folder / "gpt.yaml", [*names["gpt"], "faults.compare_every=1", "checkpoint.every=8"])
    with pytest.raises(RanksFailed, match="exit code 1"):
        run_ranks(train_with_faults, 2, recipe, out, 0, ["drift:rank=1,step=3,tensor=norm.weight"])
    failed, = [line for line in read_history(out) if line["event"] == "failed"]
    assert "step 3: of the gpt, " in failed["reason"] and "nothing is saved" in failed["reason"]


class Fake:
    """An engine of which a rank holds weights that are not finite."""

    def weights_finite(self):
        return False


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(InputError, match=r"step 3: weights of the gpt are not finite; nothing is saved: lower "
                                         r"optimizer.lr"):
        check_health({"gpt": Fake()}, 3, tmp_path, single_process())


@pytest.mark.parametrize("text, said", [
    ("fire:step=1", "'fire' is no fault"), ("kill", "say when"), ("kill:step=1,after=2", "say when"),
    ("kill:step=x", "step is 'x'"), ("kill:day=1", "'day' is not known"), ("kill:step=1,part=gpt", "part= are for"),
    ("nan:step=1,tensor=a", "tensor= is for drift and flip"),
])
def test_faults_that_make_no_sense_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        parse_fault(text)


def test_the_command_line_refuses_them_too(data, tmp_path):
    folder, names = data
    arguments = [folder / "gpt.yaml", "--out", tmp_path / "run", *names["gpt"]]
    code, output = start([*arguments, "--inject", "fire:step=1"])
    assert code == 2 and "'fire' is no fault" in output and "Traceback" not in output, output
    code, output = start([*arguments, "--inject", "kill:rank=1,step=1"])
    assert code == 2 and "there is no rank 1; this job has 1" in output, output
