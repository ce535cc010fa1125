"""The commands of README.md and docs/*.md, and how each is run in a small form: the table that their test reads.

To document a new command: write it in a ```bash block, and run tests/repository/test_documented_commands.py. If no rule
begins as the command does, add one to RULES: most need no more than `Rule("gigatok-ds COMMAND")`. The small form is the
documented command with `replace` and `add` of its rule and with EVERYWHERE, word for word; whatever is not replaced
stays, so that an option that no longer exists fails. It is run in a folder that holds what `documented_world.build`
made, under the names that the documentation uses, and what the commands before it left there.
"""

import re
import shlex
from dataclasses import dataclass, field

from places import ROOT

README = ROOT / "README.md"
# In the order in which a reader of the README meets them: what one page's commands leave, the next page's read.
_LISTED = [ROOT / path for path in dict.fromkeys(re.findall(r"\]\((docs/[\w-]+\.md)\)", README.read_text()))]
PAGES = [README, *(page for page in _LISTED if page.exists()),
         *sorted(set((ROOT / "docs").glob("*.md")) - set(_LISTED))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_VARIABLE = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Command:
    """One command: `words` as a shell would see them, comments gone."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self):
        return f"{self.page}:{self.line}-{' '.join(self.words)[:50]}"

    @property
    def plain(self):
        """The words without the variables before them."""
        return after_variables(self.words)


def after_variables(words):
    """What a shell runs of `A=1 B=2 command ...`."""
    words = list(words)
    while words and _VARIABLE.fullmatch(words[0]):
        words.pop(0)
    return tuple(words)


def blocks(language):
    """(page, line of its first line, text) of each fenced block in that language."""
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            if match[1] == language:
                yield page.relative_to(ROOT).as_posix(), text.count("\n", 0, match.start()) + 2, match[2]


def commands():
    """Every command of every bash block, continued lines joined; what is written twice comes once."""
    found = {}
    for page, first, text in blocks("bash"):
        line, waiting = first, ""
        for row in text.splitlines():
            waiting += row.removesuffix("\\")
            if row.endswith("\\"):
                continue
            words = tuple(shlex.split(waiting, comments=True))
            if words:
                found.setdefault(words, Command(page, line, words))
            line, waiting = first + 1 + text.splitlines().index(row), ""
    return list(found.values())


@dataclass(frozen=True)
class Rule:
    """How commands that begin with `begins` are run; of several rules the longest counts.

    run: `here` (this process), `fork` (one rank of its own, as training wants it, or two where a launcher starts them),
    `shell` (a process of its own), `stages` (this process, and what a study starts is forked), or `covered` (by the
    test `by`; not run here). replace, add: see the module. code: the exit code that is right. removes: what earlier
    commands left and this one writes anew.
    """

    begins: str
    run: str = "here"
    replace: dict[str, str] = field(default_factory=dict)
    add: str = ""
    code: int = 0
    removes: str = ""
    by: str = ""
    everywhere: bool = True


# Of any command; a recipe stands for one of the same kind that trains in seconds.
EVERYWHERE = {
    "VQ_SS256": "small/tokenizer.yaml",
    "VQ_BL256": "small/tokenizer.yaml",
    "GPT-B": "small/gpt.yaml",
    "--device cuda": "--device cpu",
    "--inception download": "--inception random",
    "--vgg download": "--vgg random",
    "--nproc-per-node 8": "--nproc-per-node 2 --master-port {port}",
    "--ranks 8": "--ranks 1",
}
_SMALL_REFERENCE = "--allow count --allow reference"  # of 8 images
_SMALL_PROBE = "--epochs 2 --warmup-epochs 1 --batch-size 8"
_PROBE_OF_A_STUDY = " ".join(f"--probe={word}" for word in _SMALL_PROBE.split())

RULES = [
    Rule("python3.11 -m venv .venv && .venv/bin/pip install -e .[demo]", run="covered",
         by="tests/demo/test_demo.py::test_a_run_on_my_own_images_is_self_contained"),
    Rule("python3.11 -m venv .venv && .venv/bin/pip install -e .[test]", run="covered",
         by="tests/repository/test_readme.py::test_ci_runs_the_command_that_the_readme_gives"),
    Rule(".venv/bin/pip install -e .[app]", run="covered",
         by="tests/repository/test_readme.py::test_ci_runs_the_command_that_the_readme_gives"),
    Rule("pip install -e .[app]", run="covered",
         by="tests/repository/test_readme.py::test_ci_runs_the_command_that_the_readme_gives"),
    Rule("gigatok-ds app", run="covered",
         by="tests/app/test_app.py::test_over_http_the_page_gives_what_the_views_give"),
    Rule("ssh -L", run="covered", by="tests/app/test_app.py::test_over_http_the_page_gives_what_the_views_give"),
    Rule("gigatok-ds plan", replace={"VQ_XLXXL256": "small/tokenizer.yaml", "GPT-XXL": "small/gpt.yaml"},
         add="training.global_batch_size=1024"),
    Rule("gigatok-ds doctor"),
    Rule("gigatok-ds recipes", everywhere=False),
    Rule("gigatok-ds make-shards"),
    Rule("gigatok-ds check-shards"),
    Rule("gigatok-ds check-cluster", replace={"--hostfile launch/hostfile.example": "--no-allreduce"}),
    Rule("gigatok-ds train", run="fork", replace={
        "--extend-to 2000000": "--extend-to 8",
        "training.steps=1000000": "training.steps=4", "training.steps=500000": "training.steps=5",
        "data.train=s3://bucket/imagenet/train": "data.train=file://{world}/shards/train",
        "data.cache=/scratch/shards": "data.cache=scratch"}),
    # Other hosts, and GPUs, are not at hand: what would be run there is shown.
    Rule("launch/train.sh", run="shell", replace={"launch/train.sh": "launch/train.sh --dry-run"}, everywhere=False),
    Rule("launch/torchrun.sh", run="shell", replace={"launch/torchrun.sh": "launch/torchrun.sh --dry-run"},
         everywhere=False),
    Rule("sbatch", run="shell", everywhere=False,
         replace={"sbatch --nodes=4 launch/slurm.sbatch": "launch/slurm.sbatch --dry-run"}),
    Rule("deepspeed", run="fork"),  # launch/train.sh starts by DeepSpeed's launcher, below
    # Two ranks; weights of frozen networks are drawn. The script itself is run below, by one rank.
    Rule("launch/train.sh VQ_SS256 --out runs/ss", run="fork", replace={
        "loss.perceptual.weights=weights/vgg16-397923af.pth": "loss.perceptual.weights=random",
        "loss.semantic.weights=weights/dinov2_vitb14_pretrain.pth": "loss.semantic.weights=random"}),
    Rule("launch/train.sh GPT-B", run="shell", replace={"launch/train.sh": "GPUS=1 MASTER_PORT={port} "
                                                                           "launch/train.sh"}),
    Rule("gigatok-ds status"),
    Rule("gigatok-ds replay", run="fork", replace={"385000:390000": "2:4"}),
    Rule("gigatok-ds convert", replace={"--step 390000": "--step 4"}, removes="checkpoints/tokenizer-ss"),
    Rule("gigatok-ds convert checkpoints/tokenizer-ss runs/ss512",
         replace={"model.image_size=512": "model.image_size=32"}),
    Rule("gigatok-ds convert checkpoints/tokenizer-ss runs/ss-decoder"),
    Rule("gigatok-ds convert runs/ss runs/ss-2", replace={"training.steps=100000": "training.steps=4"}),
    Rule("gigatok-ds convert checkpoints/gpt-b runs/gpt-flowers"),
    Rule("gigatok-ds convert runs/gpt-flowers"),
    Rule("gigatok-ds inspect"),
    Rule("gigatok-ds reconstruct"),
    Rule("gigatok-ds export-graph"),
    Rule("gigatok-ds extract-codes"),
    Rule("gigatok-ds sample", replace={"--classes 207,980": "--classes 1,3"}),
    # torchrun itself once; otherwise ranks that start at once, and may not start workers.
    Rule("torchrun --nproc-per-node 8 -m gigatok_ds extract-codes", run="fork", add="--workers 0"),
    Rule("torchrun --nproc-per-node 8 -m gigatok_ds sample", run="shell", replace={"--count 50000": "--count 6"}),
    Rule("torchrun --nproc-per-node 8 -m gigatok_ds evaluate generation", run="fork", add=_SMALL_REFERENCE),
    Rule("gigatok-ds evaluate generation", add=_SMALL_REFERENCE),
    Rule("gigatok-ds evaluate reconstruction", add="--allow count"),
    Rule("gigatok-ds evaluate loss"),
    Rule("gigatok-ds probe", add=_SMALL_PROBE),
    Rule("gigatok-ds reproduce"),
    Rule("gigatok-ds reproduce B-L", run="stages", add="--allow model --allow count", code=1),
    Rule("gigatok-ds reproduce GPT-B/XL-XXL", run="stages", code=1,
         add=f"--allow model {_SMALL_REFERENCE} --count 6 {_PROBE_OF_A_STUDY}"),
    Rule("gigatok-ds ar-probe", run="stages",
         add=f"--recipe GPT-B --gpt training.steps=4 --gpt training.log_every=2 --cfg 1.5 {_SMALL_REFERENCE} --count 6 "
             f"{_PROBE_OF_A_STUDY}"),
    Rule("gigatok-ds search-guidance", run="stages", add=f"{_SMALL_REFERENCE} --count 6",
         replace={"--start 2.5": "--start 1"}),
    # A report of one benchmark's small form, which a missed target does not fail.
    Rule("python benchmarks/run_all.py", run="shell", add="--quick --only convolution --out all-figures.md"),
    Rule("python benchmarks/run_all.py --only", run="shell", add="--quick --out some-figures.md",
         replace={"--only quantizer sampling": "--only convolution"}),
    Rule("python benchmarks/quantizer.py", run="shell", add="--quick --latents 64 --repeats 1 --seconds 0 --threads 1 "
                                                            "--tasks search"),
    Rule("python benchmarks/cuda_resources.py", run="covered",
         by="tests/kernels/test_cuda_kernels.py::test_the_script_tells_what_all_of_them_take"),
    Rule("python benchmarks/gpu_acceptance.py", run="covered",
         by="tests/repository/test_gpu_acceptance.py::test_every_section_in_its_small_form"),
    Rule("kill -USR1", run="covered",
         by="tests/resilience/test_stopping.py::test_a_signal_to_one_of_two_ranks_stops_both"),
]


def rule_of(command):
    """The rule with the longest beginning, None without any."""
    fitting = [rule for rule in RULES
               if any(starts(words, shlex.split(rule.begins)) for words in (command.words, command.plain))]
    return max(fitting, key=lambda rule: len(rule.begins.split()), default=None)


def starts(words, beginning):
    return list(words[:len(beginning)]) == beginning


def replacements(rule):
    return (EVERYWHERE if rule.everywhere else {}) | rule.replace


def occurs(words, wanted):
    """Where the words of `wanted` stand in a row, else None."""
    wanted = shlex.split(wanted)
    return next((i for i in range(len(words)) if starts(words[i:], wanted)), None)


def small_form(command, rule, **names):
    """The words that are run. `names` fill the braces of replacements."""
    words = list(command.words)
    for old, new in replacements(rule).items():
        if (place := occurs(words, old)) is not None:
            words[place:place + len(shlex.split(old))] = shlex.split(new.format(**names))
    added = [EVERYWHERE.get(word, word) for word in shlex.split(rule.add)]
    return [*words, *added]
