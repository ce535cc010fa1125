"""One step of tokenizer and discriminator with every loss on, as trained, against the same step in plain float64 torch.

The trained one runs in DeepSpeed engines, with the image losses differentiated outside of them, and in float32. The
plain one is a single graph: losses by their formulas, clipping and AdamW written out. Networks are shared (their own
values and gradients are held to the original's by the golden tests); everything between them is not.
"""

import pytest
import torch
import torch.nn.functional as F
from layout_runs import StandInPerceptual, StandInTeacher, use_stand_ins
from rank_runs import run_ranks
from saved_runs import read_weights
from torch import nn
from training_runs import prepare

from gigatok_ds.compat import timm_library
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.losses import composition
from gigatok_ds.models.discriminators import dino
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.streams import SampleDraws, stream_key, torch_stream

# A large epsilon, because Adam would turn rounding noise of gradients that are truly zero into whole steps.
LR, EPS, DECAY, CLIP = 1e-2, 1e-2, 0.1, 0.5
RECIPE = [
    f"optimizer={{lr: {LR}, eps: {EPS}, weight_decay: {DECAY}, max_grad_norm: {CLIP}}}", "training.steps=1",
    "training.log_every=1", "training.validate_every=1", "checkpoint.every=1", "schedule.warmup_steps=0",
    "model.semantic_head={depth: 1, teacher_width: 24}", "model.qk_norm=true", "model.grid_query=learned",
    "loss.semantic={teacher: stand-in, weight: 0.4}", "loss.perceptual={weight: 0.5}",
    "loss.quantizer={entropy: 0.02}", "loss.auxiliary={end_step: 5, feature_weight: 0.7}",
]


def small_backbone(weights):
    torch.manual_seed(7)
    return timm_library().models.VisionTransformer(patch_size=16, embed_dim=12, depth=12, num_heads=2, num_classes=0)


def smooth_block(*arguments, block=dino._block):
    """Among ten thousand activations some are so near to 0 that float32 rounds them to the other side of the kink."""
    layers = block(*arguments)
    layers[-1] = nn.SiLU()
    return layers


def train_one_step(recipe, out, settings):
    from gigatok_ds.training.run import run_training

    use_stand_ins()
    composition.dino_backbone = small_backbone
    dino._block = smooth_block
    run_training(recipe, out, settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    return folder, prepare(folder)["tokenizer"]


@pytest.fixture
def double(monkeypatch):
    """Networks compute some things in float32 whatever they are cast to; here that is float64 if they are."""
    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x, *more, **options: x if x.dtype == torch.float64 else
                        single(x, *more, **options))
    monkeypatch.setattr(composition, "dino_backbone", small_backbone)
    monkeypatch.setattr(dino, "_block", smooth_block)


def first_batch(recipe):
    training = recipe.training
    batches = ImageBatches(
        ShardIndex.open(recipe.data.train), training_transform(recipe.model.image_size, recipe.data.crop_scale, True),
        ReadingPlan(global_batch_size=training.global_batch_size, micro_batch_size=training.global_batch_size),
        seed=training.seed)
    return next(iter(batches))


class PlainStep:
    """The first step of a recipe. Attributes: generator, discriminator (after the step), losses, norms, term_norms."""

    def __init__(self, recipe):
        seed = recipe.training.seed
        self.generator = Tokenizer(recipe.model).double().train()
        initialise_(self.generator, seed)
        torch.manual_seed(stream_key(seed, "weights", "discriminator"))
        self.discriminator = composition.build_discriminator(recipe.loss.adversarial,
                                                             image_size=recipe.model.image_size)
        self.discriminator.double().train()
        for frozen in getattr(self.discriminator, "_backbone", ()):
            frozen.double()
        torch.manual_seed(0)
        self.perceptual, self.teacher = StandInPerceptual().double(), StandInTeacher().double()
        batch = first_batch(recipe)
        self.images, positions = batch["images"].double(), batch["position"]
        self.adaptive = recipe.loss.adversarial.adaptive_weight

        def draws(side):
            stream = torch_stream(seed, "discriminator-augmentation", side, 1)
            return SampleDraws(stream, recipe.training.global_batch_size, positions)

        self.draws = draws
        self.losses, self.norms, self.term_norms = {}, {}, {}
        output = self.step_generator()
        self.step_discriminator(output)

    def step_generator(self):
        output = self.generator(self.images, entropy="global", semantic=True, direct=True)
        terms, draws = {}, self.draws("generator")
        for prefix, made in (("", output.reconstruction), ("direct_", output.direct_reconstruction)):
            terms[prefix + "reconstruction"] = (made - self.images).square().mean()
            terms[prefix + "perceptual"] = 0.5 * self.perceptual(self.images, made).mean()
            terms[prefix + "adversarial"] = -0.3 * self.discriminator(made, draws).mean()
        of_images = sum(value for name, value in terms.items() if not name.endswith("adversarial"))
        adversarial = terms["adversarial"] + terms["direct_adversarial"]
        weight = self.adaptive_weight(of_images, adversarial / 0.3) if self.adaptive else 1.0

        codes = F.normalize(self.generator.quantizer.embedding, dim=1)
        latent = F.normalize(self.generator.quant_conv(self.generator.encoder(output.cnn_feature))
                             .permute(0, 2, 3, 1).flatten(0, 2), dim=1)
        nearest = codes[output.codes.flatten()]
        p = (-(latent[:, None] - codes).square().sum(2) / 0.01).softmax(1)
        mean = p.mean(0)
        student, target = output.semantic_feature, self.teacher(self.images)
        terms |= {
            "codebook": (nearest - latent.detach()).square().mean(),
            "commitment": 0.25 * (latent - nearest.detach()).square().mean(),
            "entropy": 0.02 * ((mean * (mean + 1e-5).log()).sum() - torch.special.xlogy(p, p).sum(1).mean()),
            "feature": 0.7 * (output.decoded_feature - output.cnn_feature.detach()).square().mean(),
            "semantic": -0.4 * F.cosine_similarity(student, target, dim=2).mean(),
        }
        compared = {
            "codebook": nearest, "commitment": latent, "entropy": latent, "feature": output.decoded_feature,
            "semantic": student, **dict.fromkeys(("reconstruction", "perceptual", "adversarial"),
                                                 output.reconstruction),
        }
        for name, value in terms.items():
            at = output.direct_reconstruction if name.startswith("direct_") else compared[name]
            norm = torch.autograd.grad(value, at, retain_graph=True)[0].norm()
            self.term_norms[name] = (norm * (weight if name.endswith("adversarial") else 1.0)).item()
        self.losses = {name: value.item() for name, value in terms.items()}
        if self.adaptive:
            self.losses["adaptive_weight"] = weight.item()
        latent_terms = sum(terms[name] for name in ("codebook", "commitment", "entropy", "feature", "semantic"))
        loss = of_images + weight * adversarial + latent_terms
        self.loss = loss.item()
        self.norms["generator"] = step(self.generator, loss)
        return output

    def adaptive_weight(self, of_images, adversarial):
        last = self.generator.cnn_decoder.conv_out.weight
        ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss
                        in (of_images, adversarial))
        return ours / (theirs + 1e-4)

    def step_discriminator(self, output):
        judge, draws = self.discriminator, self.draws("discriminator")
        real, fake, direct = (judge(made.detach(), draws) for made in
                              (self.images, output.reconstruction, output.direct_reconstruction))

        def hinge(fake):
            return 0.3 * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

        self.losses |= {"discriminator": hinge(fake).item(), "direct_discriminator": hinge(direct).item()}
        self.norms["discriminator"] = step(judge, hinge(fake) + hinge(direct))


def step(network, loss):
    """Clipping to CLIP and the first step of AdamW (Loshchilov & Hutter 2019); returns the norm before clipping."""
    parameters = [x for x in network.parameters() if x.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(parameters, gradients, strict=True)]
    norm = sum(g.square().sum() for g in gradients).sqrt()
    with torch.no_grad():
        for x, g in zip(parameters, gradients, strict=True):
            g = g * min(1.0, CLIP / norm.item())
            x -= LR * (DECAY * x + g / (g.abs() + EPS))  # both bias corrections are exact after one step
    return norm.item()


@pytest.mark.parametrize("adversarial", [
    "{start_step: 1, weight: 0.3, base_channels: 8, layers: 1}",
    "{start_step: 1, weight: 0.3, base_channels: 8, layers: 1, adaptive_weight: true}",
    "{start_step: 1, weight: 0.3, discriminator: dino}",
    "{start_step: 1, weight: 0.3, base_channels: 8, discriminator: stylegan}",
])
def test_a_step_is_that_of_plain_float64_torch(data, double, adversarial):
    folder, arguments = data
    size = ["model.image_size=32"] if "stylegan" in adversarial else []
    recipe = load_recipe(folder / "tokenizer.yaml", [*RECIPE, f"loss.adversarial={adversarial}", *size, *arguments])
    out = folder / f"run{len(list(folder.iterdir()))}"
    run_ranks(train_one_step, 1, recipe, out, zero_settings(1))
    plain = PlainStep(recipe)

    logged = read_metrics(out)[0]
    for name, value in plain.losses.items():
        key = (
            name
            if name == "adaptive_weight"
            else f"discriminator/{name}"
            if "discriminator" in name
            else f"loss/{name}"
        )
        assert logged[key] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert logged["loss"] == pytest.approx(plain.loss, rel=1e-5)
    for name, value in plain.norms.items():
        assert logged[f"grad_norm/{name}"] == pytest.approx(value, rel=1e-5), name
    assert {name for name in logged if name.startswith("term_grad/")} == {f"term_grad/{name}" for name
                                                                          in plain.term_norms}
    for name, value in plain.term_norms.items():
        assert logged[f"term_grad/{name}"] == pytest.approx(value, rel=2e-5), name
    checkpoint = out / "checkpoints" / "step-0000001"
    found = {"generator": read_weights(checkpoint / "generator"),
             "discriminator": read_weights(checkpoint / "discriminator")}
    for part, weights in found.items():
        for name, value in getattr(plain, part).named_parameters():
            if value.requires_grad:
                difference = (weights[name].double() - value).abs().max() / value.abs().max().clamp(min=LR)
                assert difference <= 1e-5, (part, name, difference.item())
