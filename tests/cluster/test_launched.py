"""Who a process is among the ranks of a job."""

import pytest

from gigatok_ds import InputError
from gigatok_ds.cluster.launched import ALONE, LaunchedRank, launched_rank, launched_rank_or_alone
from gigatok_ds.parallel.topology import start_process_group

FIFTH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_a_rank_is_what_the_launcher_says():
    assert launched_rank({}) == ALONE == LaunchedRank(rank=0, world_size=1, local_rank=0, local_size=1)
    assert launched_rank(FIFTH) == LaunchedRank(rank=5, world_size=8, local_rank=1, local_size=8)
    meeting = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's and DeepSpeed's
        assert launched_rank(FIFTH | {name: "4"} | meeting) == LaunchedRank(rank=5, world_size=8, local_rank=1,
                                                                           local_size=4, rendezvous=True)


@pytest.mark.parametrize("environment", [
    {"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, FIFTH | {"LOCAL_WORLD_SIZE": "four"}])
def test_what_contradicts_itself_is_refused_once(environment, monkeypatch):
    with pytest.raises(InputError, match="RANK"):
        launched_rank(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_rank_or_alone() == ALONE


def test_ranks_that_do_not_know_where_to_meet_do_not_train_alone(monkeypatch):
    for name, value in FIFTH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="rank 5 of 8, but MASTER_ADDR and MASTER_PORT"):
        start_process_group()
