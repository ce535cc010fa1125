"""check-cluster: what it says of hosts that differ, and that it finds this machine able to run ranks."""

import argparse
import os
import shutil
import socket
from dataclasses import replace

import pytest

from gigatok_ds.cli.training import check_cluster as command
from gigatok_ds.cluster import host_facts
from gigatok_ds.cluster.allreduce import STAGES, Progress
from gigatok_ds.cluster.check import Request, check_cluster
from gigatok_ds.cluster.cluster_report import Expected, HostResult, allreduce_cell, allreduce_problems, problems, table
from gigatok_ds.cluster.hostfile import Host, Rendezvous
from gigatok_ds.errors import InputError

VERSIONS = {"python": "3.11.7", "torch": "2.11.0", "deepspeed": "0.19.8", "megatron-core": "0.16.1", "nccl": "2.28.9",
            "driver": "570.1"}
GOOD = host_facts.Facts(devices=["H200"] * 8, versions=VERSIONS, code="c" * 64, recipe="r" * 64, token="t")
EXPECTED = Expected(code="c" * 64, recipe="r" * 64, token="t", shared="/shared", working_dir="/start",
                    checkout="/checkout")
MEETING = Rendezvous(address="a", port=29500)


def result(name, slots=8, **changes):
    return HostResult(host=Host(name=name, slots=slots), facts=replace(GOOD, **changes), answer_seen=True)


def problem(*results):
    """The only problem that is found."""
    (found,) = problems(results, EXPECTED)
    return found


def with_versions(**changes):
    return {"versions": VERSIONS | changes}


def test_hosts_that_agree_have_no_problem():
    hosts = [result("a"), result("b", **with_versions(driver="565.9", python="3.11.9")), result("c", slots=4)]
    assert problems(hosts, EXPECTED) == []
    lines = table(hosts).splitlines()
    assert len(lines) == 4 and "8 x H200" in lines[1] and "565.9" in lines[2] and "cccccccc" in lines[3]


@pytest.mark.parametrize(("changes", "message"), [
    (with_versions(torch="2.10.0"), "torch differs: 2.11.0 on a, c; 2.10.0 on b; install the same version"),
    (with_versions(nccl="2.27"), "nccl differs: 2.28.9 on a, c; 2.27 on b"),
    (with_versions(python="3.12.1"), "python differs: 3.11 on a, c; 3.12 on b"),
    (with_versions(**{"megatron-core": None}), "megatron-core differs: 0.16.1 on a, c; none on b"),
    ({"code": "d" * 64}, "b: its files of gigatok_ds are not those of this machine; copy /checkout there"),
    ({"recipe": "d" * 64}, "b: it reads another recipe from the same name"),
    ({"recipe": None, "recipe_error": "no such YAML file"}, "b: it cannot read the recipe (no such YAML file)"),
    ({"token": None}, "b: /shared is not the same directory there"),
    ({"write_error": "Read-only file system"}, "b: cannot write below /shared (Read-only file system)"),
    ({"working_dir_exists": False}, "b: there is no /start"),
    ({"devices": ["H200"] * 4}, "b: slots=8, but it has 4 GPUs; correct its line in the hostfile"),
    ({"device_error": "no driver"}, "b: torch does not find its devices (no driver)"),
])
def test_a_host_that_differs_is_named(changes, message):
    assert problem(result("a"), result("b", **changes), result("c")).startswith(message)


def test_other_problems_are_named():
    assert "b: ssh does not" in problem(result("a"), HostResult(host=Host(name="b", slots=8), failure="ssh does not"))
    assert problem(result("a"), replace(result("b"), answer_seen=False)).startswith("b: /shared is not the same")
    found = problems([result("a"), result("b", devices=[], **with_versions(nccl=None))], EXPECTED)
    assert found == ["some hosts have no GPU: GPU on a; CPU on b; remove those from the hostfile, or mend their driver"]
    missing = problems([result("a", **with_versions(deepspeed=None))], EXPECTED)
    assert missing == ["a: deepspeed is not installed for that python; pip install 'gigatok_ds[train]' there"]


def said(first, last, stage, error=None):
    """What ranks first..last printed on their way to `stage`."""
    lines = [Progress(rank=rank, stage=passed) for rank in range(first, last + 1)
             for passed in STAGES[:STAGES.index(stage) + 1]]
    return lines + ([Progress(rank=last, error=error)] if error else [])


def test_allreduce_names_the_hosts_that_kept_the_others_waiting():
    hosts = [Host(name="a", slots=2), Host(name="b", slots=2)]
    done = [said(0, 1, "reduced"), said(2, 3, "reduced")]
    assert allreduce_problems(hosts, done, [None, None], MEETING, "nccl") == []
    assert [allreduce_cell(host, lines) for host, lines in zip(hosts, done, strict=True)] == ["ok", "ok"]

    (found,) = allreduce_problems(hosts, [said(0, 1, "met"), []], ["no answer within 9 s"] * 2, MEETING, "nccl")
    assert found.startswith("b: all-reduce: the ranks did not start (no answer within 9 s)")
    apart = [said(0, 1, "met"), said(2, 3, "ready", "connection refused")]
    (found,) = allreduce_problems(hosts, apart, [None, "exit code 1"], MEETING, "nccl")
    assert found.startswith("b: all-reduce: ranks did not reach a:29500 (connection refused)")
    assert [allreduce_cell(host, lines) for host, lines in zip(hosts, apart, strict=True)] == ["failed", "did not meet"]
    (found,) = allreduce_problems(hosts, [said(0, 1, "met"), said(2, 3, "met")], [None, None], MEETING, "gloo")
    assert found.startswith("a, b: all-reduce: ranks met at a:29500, but gloo") and "GLOO_SOCKET_IFNAME" in found
    one_rank_missing = [said(0, 1, "reduced"), said(2, 2, "reduced")]
    assert allreduce_problems(hosts, one_rank_missing, [None, None], MEETING, "nccl")[0].startswith("b: all-reduce: ")


def test_source_hash_sees_every_file_but_what_python_compiles(tmp_path):
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "r.yaml").write_text("x: 1")
    first = host_facts.source_hash(tmp_path)
    (tmp_path / "__pycache__" / "a.pyc").write_text("1")
    assert host_facts.source_hash(tmp_path) == first
    (tmp_path / "r.yaml").write_text("x: 2")
    second = host_facts.source_hash(tmp_path)
    (tmp_path / "r.yaml").rename(tmp_path / "s.yaml")
    assert len({first, second, host_facts.source_hash(tmp_path)}) == 3


def test_probe_of_this_machine(tmp_path):
    (tmp_path / "token").write_text("secret")
    facts = host_facts.look(host_facts.Question(recipe="GPT-B", token=str(tmp_path / "token"),
                                                answer=str(tmp_path / "host-0"),
                                      working_dir=str(tmp_path / "none")))
    assert facts.recipe == host_facts.recipe_hash("GPT-B") != host_facts.recipe_hash("GPT-L")
    assert facts.token == "secret" and (tmp_path / "host-0").is_file() and facts.write_error is None
    assert facts.versions["torch"] and facts.versions["deepspeed"] and facts.device_error is None
    assert not facts.working_dir_exists and len(facts.code) == 64


def test_probe_says_what_a_host_cannot_do(tmp_path):
    nowhere = tmp_path / "x"
    facts = host_facts.look(host_facts.Question(recipe="no_such.yaml", token=str(nowhere), answer=str(nowhere / "y")))
    assert facts.recipe is None and "no_such.yaml" in facts.recipe_error
    assert facts.token is None and facts.write_error == "No such file or directory"


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_this_machine_is_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MASTER_PORT", free_port())
    assert run("--out", tmp_path / "runs" / "x", "--recipe", "demo_gpt") == 0
    out = capsys.readouterr().out
    row = out.splitlines()[1]
    assert row.startswith("this machine") and row.split()[-2:] == ["ok", "ok"] and "no problem found" in out
    assert list(tmp_path.iterdir()) == []


# Stands for ssh: hosts named `good` run the command here, `slow` ones never answer, others cannot be reached.
SSH = r"""#!/bin/bash
while [[ $1 == -o ]]; do shift 2; done
case $1 in
good*) exec sh -c "$2" ;;
slow*) exec sleep 30 ;;
*) echo "ssh: connect to host $1 port 22: Connection refused" >&2; exit 255 ;;
esac
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """A hostfile writer; the `ssh` first on PATH is the one above."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))

    def hostfile(text):
        (tmp_path / "hosts").write_text(text)
        return tmp_path / "hosts"

    return hostfile


def test_hosts_that_do_not_answer_are_named(ssh, tmp_path, monkeypatch):
    from gigatok_ds.cluster import remote_shell

    monkeypatch.setattr(remote_shell, "CONNECT_SECONDS", 0)
    monkeypatch.setattr(remote_shell, "_GRACE", 1)
    (tmp_path / "shared").mkdir()
    request = Request(hostfile=ssh("gone slots=2\nslow slots=2\n"), out=tmp_path / "shared", seconds=1)
    verdict = check_cluster(request, {})
    found = [line for line in verdict.problems if "pdsh" not in line]
    assert found[0].startswith("gone: ssh does not reach it (ssh: connect to host gone port 22: Connection refused)")
    assert found[1].startswith("slow: no answer within 1 s") and len(found) == 2
    assert verdict.table.count("no answer") == 2 and verdict.table.count("not tried") == 2
    assert list((tmp_path / "shared").iterdir()) == []


def test_two_hosts_sum_over_their_ranks(ssh, tmp_path, monkeypatch):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "HF_HOME": "a 'b' $HOME"}
    monkeypatch.chdir(tmp_path)
    hostfile = ssh("good-1 slots=1\ngood-2 slots=1\n")
    verdict = check_cluster(Request(hostfile=hostfile, out=tmp_path / "runs"), environment)
    rows = [line.split() for line in verdict.table.splitlines()[1:]]
    assert [(row[0], row[1], *row[-2:]) for row in rows] == [("good-1", "1", "ok", "ok"), ("good-2", "1", "ok", "ok")]
    assert [line for line in verdict.problems if "pdsh" not in line] == []
    assert bool(verdict.problems) == (shutil.which("pdsh") is None)


def test_bad_input_is_refused(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="line 2"):
        check_cluster(Request(hostfile=tmp_path / "hosts"), {})
    with pytest.raises(InputError, match="there is no hostfile"):
        check_cluster(Request(hostfile=tmp_path / "none"), {})
    with pytest.raises(InputError, match="GPT-B"):
        check_cluster(Request(recipe="GPT-BB"), {})
    with pytest.raises(InputError, match="is not a directory"):
        check_cluster(Request(out=tmp_path / "file" / "run"), {})
    with pytest.raises(InputError, match="--timeout is 0"):
        check_cluster(Request(seconds=0), {})
