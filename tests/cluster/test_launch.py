"""launch/: what would be run, what ranks on other hosts are given, and that it arrives there unchanged."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from gigatok_ds.cluster.hostfile import Host, Rendezvous, read_hostfile, rendezvous
from gigatok_ds.cluster.ssh_environment import export_statements, for_deepspeed, rank_variables
from gigatok_ds.errors import InputError

LAUNCH = ROOT / "launch"
SCRIPTS = ("train.sh", "train_tokenizer.sh", "train_gpt.sh", "torchrun.sh", "slurm.sbatch")
BIN = str(Path(sys.executable).parent)
AWKWARD = ["runs/a b", "optimizer.betas=[0.9,0.95]", 'name="q" $HOME `id` \\ \'s\'', "it's", "a*{b,c};(d)", "100%h %n",
           "tab\there", "$(id)", "~", "back\\slash", ""]
LINES = ["runs/new\nline", "a new\nline; touch pwned", "\n$(touch pwned)", "'\n`touch pwned`\n\"", "x\n"]


def launch(script, *arguments, folder, path=(), timeout=60, **variables):
    """Run a script of launch/ from `folder`, in an environment that holds little but `variables`."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "LANG") if name in os.environ}
    environment = kept | {"HOME": str(folder), "PATH": os.pathsep.join([*path, BIN, "/usr/bin", "/bin"])} | variables
    return subprocess.run(["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True, cwd=folder,
                          env=environment, timeout=timeout, check=False)


def commands(finished):
    """The commands that a dry run printed, as lists of words."""
    assert finished.returncode == 0, finished.stderr
    lines = [shlex.split(line) for line in finished.stdout.splitlines() if not line.startswith("#")]
    return [words for words in lines if words and words[0] != "export"]


@pytest.fixture
def hostfile(tmp_path):
    (tmp_path / "hosts").write_text("# two\nworker-1 slots=2\n\nworker-2 slots=2 max_slots=4\n")
    return str(tmp_path / "hosts")


def test_hostfile_is_read_as_deepspeed_reads_it(hostfile):
    assert read_hostfile(hostfile, {}) == [Host(name="worker-1", slots=2), Host(name="worker-2", slots=2)]
    assert read_hostfile(hostfile, {"GPUS": "4"}) == [Host(name="worker-1", slots=4), Host(name="worker-2", slots=4)]
    assert len(read_hostfile(LAUNCH / "hostfile.example", {})) == 2


@pytest.mark.parametrize(("text", "message"), [
    ("a slots=1\nb\n", "line 2: 'b' is not of the form HOST slots=N"),
    ("a slot=1", "line 1: 'a slot=1' is not of the form"),
    ("\na slots=0", "line 2: a has slots=0"),
    ("a slots=1\n#\na slots=2", "line 3: a appears twice"),
    ("-oProxyCommand=x slots=1", "is not a host name"),
    ("me@a slots=1", "is not a host name"),
    ("# nothing\n", "names no host"),
    ("w1 slots=8, w2 slots=8\n", "line 1: 'w1 slots=8, w2 slots=8' is not of the form HOST slots=N"),
    ("a slots=1\nworker[1-4] slots=8\n",
     "line 2: 'worker[1-4] slots=8' stands for several hosts; give each host a line"),
    ("worker{1,2} slots=8", "stands for several hosts"),
    ("worker [1-4] slots=8", "line 1: "),
    ("a slots=8.5", "line 1: 'a slots=8.5' is not of the form"),
    ("a slots=8x", "is not of the form"), ("a slots=\u0668", "is not of the form"),
    ("a slots=-1", "is not of the form"),
    ("a slots=1 slots=2", "is not of the form"), ("a slots=1 b slots=2", "is not of the form"),
    ("a:8", "is not of the form"), ("a 8", "is not of the form"), ("a slots=1; b slots=2", "is not of the form"),
    ("a slots=1\x0bb slots=2", "line 1: "), ("a slots=1\u2028b slots=2", "line 1: "),
    ("\ufeffa slots=1", "line 1: it begins with a byte-order mark"), ("a,b slots=1", "is not a host name"),
    ("a\ufeff slots=1", "is not a host name"), ("h\u00f6st slots=1", "is not a host name"),
    ("$(id) slots=1", "is not a host name"),
])
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_hostfile(tmp_path / "hosts", {})
    assert message in str(error.value) and str(tmp_path / "hosts") in str(error.value)


def test_a_hostfile_from_another_system_is_read_like_one_from_here(tmp_path):
    (tmp_path / "hosts").write_bytes(b"# two\r\nworker-1.a slots=2  # rack 7\r\nworker_2\tslots=4 max_slots=8\r\n")
    assert read_hostfile(tmp_path / "hosts", {}) == [Host(name="worker-1.a", slots=2), Host(name="worker_2", slots=4)]


def test_ranks_meet_at_the_first_host_unless_told_otherwise():
    hosts = [Host(name="a", slots=1), Host(name="b", slots=1)]
    assert rendezvous(hosts, {}) == Rendezvous(address="a", port=29500)
    chosen = rendezvous(hosts, {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "3000"})
    assert chosen == Rendezvous(address="10.0.0.7", port=3000)
    for wrong in ("0", "x", "70000"):
        with pytest.raises(InputError, match="MASTER_PORT is"):
            rendezvous(hosts, {"MASTER_PORT": wrong})


def test_env_files_are_merged_and_win_over_this_shell(tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    (home / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nBOTH=home\n")
    (work / ".deepspeed_env").write_text("# comment with = in it\n\nBOTH=work\nOMP_NUM_THREADS = 3\nDATA=$HOME/x\n")
    shell = {"OMP_NUM_THREADS": "7", "NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth1", "HF_HOME": "/a b/$x",
             "HF_TOKEN": "secret", "AWS_SECRET": "secret", "PATH": "/bin"}
    assert rank_variables(shell, home, work) == {
        "NCCL_DEBUG": "INFO", "BOTH": "work", "OMP_NUM_THREADS": "3", "DATA": "$HOME/x",
        "GLOO_SOCKET_IFNAME": "eth1", "HF_HOME": "/a b/\\$x",
    }
    (work / "mine").write_text("A=1\n")
    assert rank_variables({"DS_ENV_FILE": "mine"}, home, work) == {"A": "1"}
    (work / "mine").write_text("A=1\nexport B=2\n")
    with pytest.raises(InputError, match="mine line 2: 'export B=2' is not of the form NAME=value"):
        rank_variables({"DS_ENV_FILE": str(work / "mine")}, home, work)


def test_the_example_env_file_is_one(tmp_path):
    (tmp_path / ".deepspeed_env").write_text((LAUNCH / "deepspeed_env.example").read_text())
    assert "NCCL_SOCKET_IFNAME" in rank_variables({}, tmp_path, tmp_path)


def test_exported_values_are_what_this_shell_has(tmp_path):
    shell = {"HF_HOME": "a b", "NCCL_X": '$HOME `id` "q" \\', "OMP_Y": "plain"}
    script = export_statements(rank_variables(shell, tmp_path, tmp_path)) + 'printf "%s|" "$HF_HOME" "$NCCL_X" "$OMP_Y"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == (
        'a b|$HOME `id` "q" \\|plain|')


def test_deepspeed_leaves_plain_arguments_alone():
    for plain in ("GPT-B", "--out", "data.train=/a/b", "optimizer.lr=2e-4", "a,b"):
        assert for_deepspeed(plain) == plain


def test_dry_run_of_several_hosts(hostfile, tmp_path):
    (tmp_path / ".deepspeed_env").write_text("# mine\nNCCL_DEBUG=WARN\n")
    finished = launch("train.sh", "--dry-run", "GPT-B", "--out", "runs/x", folder=tmp_path, HOSTFILE=hostfile,
                      MASTER_PORT="4000", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="2")
    assert commands(finished) == [[
        str(Path(BIN) / "deepspeed"), "--no_local_rank", "--master_port", "4000", "--hostfile", hostfile,
        "--master_addr", "worker-1", "--module", "gigatok_ds", "train", "GPT-B", "--out", "runs/x"]]
    given = {line.removeprefix("#   ") for line in finished.stdout.splitlines() if line.startswith("#   ")}
    assert given == {"NCCL_DEBUG=WARN", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=2", f"PYTHONPATH={ROOT}"}
    assert f"export PYTHONPATH={ROOT}" in finished.stdout.splitlines()
    (tmp_path / ".deepspeed_env").write_text("PYTHONPATH=/mine\n")
    again = launch("train.sh", "--dry-run", "GPT-B", folder=tmp_path, HOSTFILE=hostfile)
    assert f"#   PYTHONPATH={ROOT}:/mine" in again.stdout.splitlines()


def test_dry_run_of_one_host(tmp_path):
    (tmp_path / "hosts").write_text("worker-1 slots=4\n")
    assert commands(launch("train.sh", "--dry-run", "r", *AWKWARD, folder=tmp_path, GPUS="2")) == [[
        str(Path(BIN) / "deepspeed"), "--no_local_rank", "--master_port", "29500", "--num_gpus", "2", "--module",
        "gigatok_ds", "train", "r", *AWKWARD]]
    local = launch("train.sh", "--dry-run", "r", folder=tmp_path, HOSTFILE="hosts")
    assert "--no_ssh_check" in commands(local)[0] and "FORCE_SSH=1" in local.stderr
    assert "--force_multi" in commands(launch("train.sh", "--dry-run", "r", folder=tmp_path, HOSTFILE="hosts",
                                              FORCE_SSH="1"))[0]


def test_dry_runs_of_the_short_scripts(tmp_path):
    words = commands(launch("train_tokenizer.sh", "--dry-run", "training.steps=3", folder=tmp_path, RECIPE="VQ_BL256",
                            SHARDS="/my data", OUT="runs/a b", TP="2", ZERO="3"))[0]
    assert words[words.index("train"):] == [
        "train", "VQ_BL256", "--out", "runs/a b", "--zero", "3", "data.train=/my data/train",
        "data.validation=/my data/val", "loss.perceptual.weights=weights/vgg16-397923af.pth",
        "loss.semantic.weights=weights/dinov2_vitb14_pretrain.pth", "--tp", "2", "training.steps=3"]
    words = commands(launch("train_gpt.sh", "--dry-run", folder=tmp_path, CODES="/codes"))[0]
    assert words[words.index("train"):] == ["train", "GPT-B", "--out", "runs/GPT-B", "--zero", "1",
                                            "data.train=/codes/train", "data.validation=/codes/val"]


def test_dry_runs_without_ssh(tmp_path):
    words = commands(launch("torchrun.sh", "--dry-run", *AWKWARD[:5], folder=tmp_path, NNODES="2", NODE_RANK="1",
                            MASTER_ADDR="a", GPUS="4"))[0]
    assert words == [str(Path(BIN) / "python"), "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", "1",
                     "--nproc_per_node", "4", "--master_addr", "a", "--master_port", "29500", "-m", "gigatok_ds",
                     "train", *AWKWARD[:5]]
    one_rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    assert commands(launch("torchrun.sh", "--dry-run", "r", folder=tmp_path, **one_rank)) == [
        [str(Path(BIN) / "python"), "-u", "-m", "gigatok_ds", "train", "r"]]
    outside = commands(launch("slurm.sbatch", "--dry-run", "r", "a b", folder=tmp_path))
    assert outside[0][:3] == ["srun", "--ntasks", "2"] and outside[0][-2:] == ["r", "a b"]
    assert "torch.distributed.run" in outside[1]


HOSTILE = ["a[$(touch pwned)] `touch pwned`; touch pwned", "' ; touch pwned ; '\ntouch pwned\n",
           '" ; touch pwned ; " > pwned']


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_path_is_executed(text, tmp_path):
    """Paths with spaces, quotes and new lines, as arguments, in variables, as the hostfile's name and in it."""
    def words(script, *arguments, **variables):
        finished = launch(script, "--dry-run", *arguments, folder=tmp_path, **variables)
        assert finished.returncode == 0, finished.stderr
        said = "\n" + finished.stdout
        statement = said[said.rindex(f"\n{Path(BIN) / ('python' if script == 'torchrun.sh' else 'deepspeed')}")
                         + 1 :].removesuffix("\n")
        read = subprocess.run(["bash", "-c", f"printf '%s\\0' {statement}"], capture_output=True, text=True,
                              cwd=tmp_path, check=True)
        return read.stdout.split("\0")[:-1]  # as whoever pastes it has it

    short = words("train_gpt.sh", f"x={text}", CODES=text, OUT=text, RECIPE=text, ZERO=text, TP=text)
    assert short[short.index("train"):] == ["train", text, "--out", text, "--zero", text, f"data.train={text}/train",
                                            f"data.validation={text}/val", "--tp", text, f"x={text}"]
    short = words("train_tokenizer.sh", SHARDS=text, WEIGHTS=text, OUT=text)
    assert short[short.index("train") + 3] == text and f"data.train={text}/train" in short
    assert words("torchrun.sh", text, MASTER_ADDR=text)[-1] == text
    named = tmp_path / text.replace("/", "_")
    named.write_text("worker-1 slots=2\nworker-2 slots=2\n")
    several = words("train.sh", "r", HOSTFILE=str(named))
    assert several[several.index("--hostfile") + 1] == str(named)
    for line in (f"{text} slots=2", f"worker-1 slots={text}", f"worker-1 slots=2 {text}"):
        (tmp_path / "hosts").write_text(f"{line}\nworker-2 slots=2\n")
        finished = launch("train.sh", "r", folder=tmp_path, HOSTFILE="hosts", path=[str(tmp_path)])
        assert finished.returncode == 2 and "hosts line 1" in finished.stderr and len(finished.stderr.splitlines()) == 1
    for variable in ("GPUS", "MASTER_PORT"):
        finished = launch("train.sh", "r", folder=tmp_path, **{variable: text})
        assert (
            finished.returncode == 2 and f"{variable} is" in finished.stderr and len(finished.stderr.splitlines()) == 1
        )
    launch("slurm.sbatch", "--dry-run", text, folder=tmp_path, SLURM_JOB_ID=text, SLURM_SUBMIT_DIR=str(ROOT))
    assert not (tmp_path / "pwned").exists()


def test_a_slurm_job_starts_torchrun_on_each_node(tmp_path):
    tools = {"scontrol": "echo node7; echo node8", "srun": 'printf "%s\\n" "$MASTER_ADDR" "$NNODES" "$@"'}
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "16",
           "SLURM_SUBMIT_DIR": str(ROOT)}
    spooled = tmp_path / "slurm_script"  # Slurm runs a copy
    spooled.write_text((LAUNCH / "slurm.sbatch").read_text())
    finished = launch(spooled, "GPT-B", "a b", folder=tmp_path, path=[str(tmp_path)], **job)
    assert finished.stdout.splitlines() == [
        "node7", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1", "--cpus-per-task", "16",
        str(LAUNCH / "torchrun.sh"), "GPT-B", "a b"]
    elsewhere = launch(spooled, "GPT-B", folder=tmp_path, path=[str(tmp_path)], **job | {"SLURM_SUBMIT_DIR": "/"})
    assert elsewhere.returncode == 2 and "submit the job from the checkout" in elsewhere.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script, tmp_path):
    finished = launch(script, "--help", folder=tmp_path)
    assert finished.returncode == 0 and len(finished.stdout) > 400 and "Environment" in finished.stdout
    assert not any(line.startswith("#") for line in finished.stdout.splitlines())


@pytest.mark.parametrize(("script", "variables", "message"), [
    ("train.sh", {"HOSTFILE": "/no/such"}, "there is no hostfile /no/such"),
    ("train.sh", {"GPUS": "all"}, "GPUS is 'all'; a whole number"),
    ("torchrun.sh", {"NNODES": "2"}, "set MASTER_ADDR"),
    ("torchrun.sh", {"RANK": "1"}, "RANK, LOCAL_RANK and WORLD_SIZE must all be set"),
    ("slurm.sbatch", {}, "this is not a Slurm job"),
])
def test_bad_input_is_one_line(script, variables, message, tmp_path):
    finished = launch(script, "GPT-B", folder=tmp_path, **variables)
    assert finished.returncode == 2 and finished.stdout == ""
    assert message in finished.stderr and len(finished.stderr.splitlines()) == 1


def test_a_python_without_deepspeed_is_one_line(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    finished = launch("train.sh", "GPT-B", folder=tmp_path, path=[str(tmp_path / "bare" / "bin")])
    assert finished.returncode == 2 and "has no deepspeed" in finished.stderr and len(finished.stderr.splitlines()) == 1


def test_a_working_directory_that_deepspeed_cannot_pass_on_is_refused(hostfile, tmp_path):
    (tmp_path / "a b").mkdir()
    finished = launch("train.sh", "--dry-run", "r", folder=tmp_path / "a b", HOSTFILE=hostfile)
    assert finished.returncode == 2 and "without spaces" in finished.stderr


# What pdsh does with its command before ssh hands it to the shell of a host: %n is the host's number, %% is %.
PDSH = r"""#!/bin/bash
while [[ $1 == -* ]]; do case $1 in -S) shift ;; *) shift 2 ;; esac; done
printf '%s' "$*" >"$HOME/sent"
"""
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))"


def test_arguments_and_environment_arrive_through_deepspeed_and_a_shell(hostfile, tmp_path):
    for name, text in {"pdsh": PDSH, "ssh": "#!/bin/sh\nexit 0\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".deepspeed_env").write_text("# a comment, which DeepSpeed alone would stop at\nMINE=x y\n")
    given = {"HF_HOME": '/cache "of" $USER 50%n', "NCCL_DEBUG": "WARN", "DS_ACCELERATOR": "cpu"}
    finished = launch("train.sh", *AWKWARD, *LINES, folder=tmp_path, path=[str(tmp_path)], HOSTFILE=hostfile, **given)
    assert finished.returncode == 0, finished.stderr
    sent = (tmp_path / "sent").read_text()
    received = sent.replace("%%", "\0").replace("%n", "1").replace("\0", "%")
    assert "%h" not in sent.replace("%%", "")
    shown, launchers = re.subn(rf"{re.escape(BIN)}/python\S* -u -m deepspeed\.launcher\.launch",
                               lambda _: f"{sys.executable} -c {shlex.quote(SHOW)}", received)
    assert launchers == 1
    words, folder, environment = json.loads(subprocess.run(
        ["sh", "-c", shown], capture_output=True, text=True, check=True, env={"PATH": "/bin"}, cwd=tmp_path).stdout)
    assert words[words.index("train") + 1:] == AWKWARD + LINES
    assert not (tmp_path / "pwned").exists()
    assert "--node_rank=1" in words and folder == str(tmp_path)
    assert environment["MINE"] == "x y" and environment["PYTHONPATH"] == str(ROOT)
    assert {name: environment[name] for name in given} == given
    assert [path.name for path in tmp_path.glob(".*")] == [".deepspeed_env"]
