"""Ten steps of a tiny tokenizer or GPT on any layout, with every loss switched on, and what they left."""

import dataclasses

import torch
from rank_runs import run_ranks
from saved_runs import read_weights
from torch import nn
from training_runs import partitioning, prepare

from gigatok_ds.config.load import load_recipe
from gigatok_ds.losses.perceptual import PerceptualDistance
from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics
from gigatok_ds.parallel.dropout import MapDropout

STEPS = 10
# A large epsilon, because Adam would turn the rounding noise of gradients that are truly zero (biases of attention
# keys, whatever a norm takes out again) into steps of the learning rate's size.
COMMON = ["optimizer.eps=1e-3", f"training.steps={STEPS}", "training.log_every=1",
          f"training.validate_every={STEPS}", f"checkpoint.every={STEPS}", "schedule.warmup_steps=2"]
OVERRIDES = {
    "tokenizer": [*COMMON, "optimizer.lr=1e-4", "optimizer.max_grad_norm=0.5", "model.grid_query=learned",
                  "model.encoder={width: 32, layers: 2, heads: 4}",
                  "model.decoder={width: 32, layers: 2, heads: 4}", "model.qk_norm=true",
                  "model.semantic_head={depth: 1, teacher_width: 24}", "loss.semantic={teacher: stand-in}",
                  "loss.perceptual={weight: 0.5}", "loss.adversarial.adaptive_weight=true"],
    "gpt": [*COMMON, "optimizer.lr=3e-3", "optimizer.max_grad_norm=0.5",
            "model.size={width: 32, layers: 2, heads: 4}", "model.qk_norm=true"],
}
PARTS = {"tokenizer": "generator", "gpt": "gpt"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    tensor: int = 1
    data: int = 1
    stage: int = 0
    recompute: bool = False
    sequence: bool = False
    accumulate: bool = False

    def __str__(self):
        flags = [name for name in ("recompute", "sequence", "accumulate") if getattr(self, name)]
        return "-".join([f"tp{self.tensor}-dp{self.data}-zero{self.stage}", *flags])


def shown(images):
    """How many there are; none of those without values, with which operations are counted."""
    return len(images) if type(images) is torch.Tensor and not images.is_meta else 0


class StandInTeacher(nn.Module):
    """As many patch tokens as the feature map has cells; frozen, and counting the images it sees."""

    seen = 0

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 2, stride=2).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        StandInTeacher.seen += shown(images)
        return self.patches(images).flatten(2).transpose(1, 2)


class StandInPerceptual(PerceptualDistance):
    def __init__(self, dropout=False):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3).requires_grad_(False)
        self.dropout = MapDropout(0.5 if dropout else 0.0)

    def look(self, images):
        return [torch.tanh(self.features(images))]

    def distance(self, seen, reconstruction):
        return self.dropout((seen[0] - torch.tanh(self.features(reconstruction))).square()).mean(dim=(1, 2, 3))


def stand_in_objective(config, *, device, grid, precision):
    from gigatok_ds.losses.composition import TokenizerObjective

    torch.manual_seed(0)
    return TokenizerObjective(config, perceptual=StandInPerceptual(config.perceptual.dropout),
                              teacher=StandInTeacher()).to(device)


def use_stand_ins():
    """In this process, frozen networks are stand-ins and need no files."""
    from gigatok_ds.training import frozen_weights, tokenizer_task

    tokenizer_task.build_objective = stand_in_objective
    frozen_weights.weight_files = lambda config: []
    frozen_weights.check_teacher = lambda config, model: None


def compile_quickly():
    """In this process, torch.compile traces and differentiates as always, but what it finds is run as it is: no C++ is
    compiled.
    """
    compiled = torch.compile
    torch.compile = lambda *function, mode=None, **options: compiled(*function, backend="aot_eager", **options)


def train_on_a_rank(recipe, out, settings, quickly=False):
    from gigatok_ds.parallel import cross_entropy
    from gigatok_ds.training.run import run_training

    cross_entropy.CHUNK_LOGITS = 10 * 64  # several chunks, and others on every layout
    use_stand_ins()
    if quickly:
        compile_quickly()
    run_training(recipe, out, settings)


class LayoutRuns:
    """Data below `folder`, and each layout's run on demand, once. begin: is given the recipe and the directory of a run
    that is about to be trained.
    """

    def __init__(self, folder, begin=lambda recipe, out: None):
        self.folder, self.begin = folder, begin
        self.data = prepare(folder)
        self.finished = {}

    def recipe(self, kind, layout, *more):
        tensor = [f"parallel.tensor={layout.tensor}", f"parallel.sequence={str(layout.sequence).lower()}",
                  f"parallel.recompute_every={int(layout.recompute)}"]
        if kind == "tokenizer":
            tensor.append(f"parallel.recompute_cnn={str(layout.recompute).lower()}")
        if layout.accumulate:
            tensor.append(f"training.micro_batch_size={8 // layout.data // 2}")
        return load_recipe(self.folder / f"{kind}.yaml", [*OVERRIDES[kind], *self.data[kind], *tensor, *more])

    def result(self, kind, layout, *more, quickly=False):
        """(metrics of each step, full float32 weights of the trained network). quickly: see `compile_quickly`."""
        key = (kind, str(layout), quickly, *more)
        if key not in self.finished:
            recipe = self.recipe(kind, layout, *more)
            out = self.folder / f"run-{len(self.finished)}"
            self.begin(recipe, out)
            run_ranks(train_on_a_rank, layout.tensor * layout.data, recipe, out, partitioning(layout.stage), quickly,
                      timeout=900)
            checkpoint = out / "checkpoints" / f"step-{STEPS:07d}" / PARTS[kind]
            self.finished[key] = read_metrics(out), read_weights(checkpoint)
        return self.finished[key]


def largest_differences(ours, theirs):
    """Of losses, of gradient norms, and of weights: relative, to at least 0.1 for a loss and 0.01 for a weight.

    Some terms are differences of larger numbers (the adversarial one is a mean of logits of either sign), and biases
    without a gradient stay near zero, where nothing relative can be said of them. A weight is compared with the largest
    of its tensor. Gradient norms of single terms, which are watched and not trained with, count a tenth: the entropy's
    is a difference of probabilities at a temperature of 0.01, which multiplies rounding.
    """
    losses = norms = 0.0
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"step"}:
            difference = abs(mine[name] - other[name])
            if name.startswith(("grad_norm", "term_grad")):
                norms = max(norms, difference / other[name] / (10 if name.startswith("term_grad") else 1))
            elif not of_the_machine(name):
                losses = max(losses, difference / max(abs(other[name]), 0.1))
    weights = max(((value - theirs[1][name]).abs().max() / theirs[1][name].abs().max().clamp(min=0.01)).item()
                  for name, value in ours[1].items() if value.is_floating_point())
    return losses, norms, weights
