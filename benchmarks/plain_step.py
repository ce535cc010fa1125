"""A tokenizer's training step as one would first write it in plain torch: what `tokenizer_step.py` compares ours with.

Eager modules in torch's default memory layout, one autograd graph over everything, a quantizer that holds the whole
latents x codes matrix, LPIPS called once per reconstruction, torch's AdamW; bf16 is autocast over float32 weights, but
what ours computes in float32 (quantizer, LPIPS) is float32 here, too. Attention is torch's own fused one. Parameter
names are the package's, so that weights pass from one to the other. The teacher, the rotation trick, and the
re-arrangement of tokens are the package's: nothing there is made faster by it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.config.losses import AdversarialConfig
from gigatok_ds.config.model import CNNConfig, QuantizerConfig, TokenizerConfig
from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.losses.perceptual import READOUTS
from gigatok_ds.models.latent_encoder import map_to_tokens, multi_level_pool, tokens_to_map
from gigatok_ds.models.quantizer import USAGE_WINDOW, rotate, straight_through

TEMPERATURE = 0.01


def check_supported(recipe: TokenizerRecipe) -> None:
    """InputError when a recipe has something that the plain step does not know."""
    model, loss = recipe.model, recipe.loss
    plain_cnn = CNNConfig(base_channels=model.cnn.base_channels, residual_blocks=model.cnn.residual_blocks,
                          encoder_multipliers=model.cnn.encoder_multipliers,
                          decoder_multipliers=model.cnn.decoder_multipliers)
    plain = replace(model, layout="1d", dropout=0.0, qk_norm=False, cnn=plain_cnn, latent_query="multi_level",
                    grid_query="first_token")
    if model != plain:
        raise InputError(f"{recipe.name}: the plain step knows 1d tokenizers without dropout, qk_norm or attention in "
                         "the CNN only; choose another recipe")
    judge = loss.adversarial
    if judge and judge != AdversarialConfig(start_step=judge.start_step, weight=judge.weight, layers=judge.layers,
                                            base_channels=judge.base_channels):
        raise InputError(f"{recipe.name}: the plain step knows the patchgan discriminator with hinge losses and "
                         "without adaptive weight only; choose another recipe")
    features = loss.auxiliary.feature if loss.auxiliary else "mse"
    if loss.perceptual is None or features != "mse" or loss.reconstruction.kind != "l2":
        raise InputError(f"{recipe.name}: the plain step has a perceptual loss, and measures pixels and features by "
                         "l2; choose another recipe")


# The model


class PlainResidualBlock(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, before, eps=1e-6), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, after, eps=1e-6), nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PlainDownsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class PlainUpsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        b, c, h, w = x.shape
        return x.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)


class PlainLevel(nn.Module):
    def __init__(self, before: int, width: int, blocks: int, **resampler: nn.Module):
        super().__init__()
        widths = [before] + [width] * blocks
        self.res = nn.ModuleList(PlainResidualBlock(*pair) for pair in itertools.pairwise(widths))
        for name, module in resampler.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in [*self.res, *(module for name, module in self.named_children() if name != "res")]:
            x = module(x)
        return x


class PlainCNNEncoder(nn.Module):
    def __init__(self, config: CNNConfig, z: int):
        super().__init__()
        widths = [config.base_channels * m for m in config.encoder_multipliers]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            PlainLevel(before, width, config.residual_blocks,
                       **({"downsample": PlainDownsample(width)} if index < len(widths) - 1 else {}))
            for index, (before, width) in enumerate(zip([config.base_channels, *widths], widths, strict=False)))
        self.mid = nn.Sequential(*(PlainResidualBlock(widths[-1], widths[-1]) for _ in range(2)))
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PlainAdaptiveNorm(nn.Module):
    def __init__(self, channels: int, z: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6, affine=False)
        self.gamma, self.beta = nn.Linear(z, channels), nn.Linear(z, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        style = style.flatten(2)
        scale = self.gamma((style.var(2) + 1e-6).sqrt())
        return scale[:, :, None, None] * self.norm(x) + self.beta(style.mean(2))[:, :, None, None]


class PlainCNNDecoder(nn.Module):
    def __init__(self, config: CNNConfig, z: int):
        super().__init__()
        widths = [config.base_channels * m for m in reversed(config.decoder_multipliers)]
        befores = [widths[0], *widths]
        self.conv_in = nn.Conv2d(z, widths[0], 3, padding=1)
        self.mid = nn.Sequential(*(PlainResidualBlock(widths[0], widths[0]) for _ in range(2)))
        self.adaptive = nn.ModuleList(PlainAdaptiveNorm(before, z) for before in befores[:-1])
        self.conv_blocks = nn.ModuleList(
            PlainLevel(before, width, config.residual_blocks + 1,
                       **({"upsample": PlainUpsample(width)} if index < len(widths) - 1 else {}))
            for index, (before, width) in enumerate(zip(befores, widths, strict=False)))
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for adaptive, level in zip(self.adaptive, self.conv_blocks, strict=False):
            x = level(adaptive(x, z))
        return self.conv_out(F.silu(self.norm_out(x)))


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, *inputs: Tensor) -> Tensor:
        projected = [project(x) for project, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=False)]
        q, k, v = (x.unflatten(2, (self.heads, -1)).permute(1, 2, 0, 3) for x in projected)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2))


class PlainLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn, self.multihead_attn = PlainAttention(width, heads), PlainAttention(width, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.self_attn(normed + position, normed + position, normed)
        x = x + self.multihead_attn(self.norm2(x) + position, memory + memory_position, memory)
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))


class PlainTransformer(nn.Module):
    """Encoder or decoder, by the name of its embedding and the kernel of its output convolution."""

    def __init__(self, config: TokenizerConfig, size, embedding: str, kernel: int):
        super().__init__()
        self.embedding, width = embedding, size.width
        self.positional_embedding = nn.Parameter(torch.empty(config.grid**2, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(config.latent_tokens, 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(config.z_channels), nn.LayerNorm(width)
        self.add_module(embedding, nn.Linear(config.z_channels, width))
        self.transformer = nn.ModuleList(PlainLayer(width, size.heads) for _ in range(size.layers))
        self.conv_out = nn.Conv2d(width, config.z_channels, kernel, padding=kernel // 2)

    def embed(self, feature: Tensor) -> Tensor:
        return self.get_submodule(self.embedding)(self.ln_pre(map_to_tokens(feature)))


class PlainEncoder(PlainTransformer):
    def __init__(self, config: TokenizerConfig):
        super().__init__(config, config.encoder_size, "encoder_embed", 1)
        self.tokens, self.grid = config.latent_tokens, config.grid
        self.global_proj = nn.Linear(config.encoder_size.width, config.encoder_size.width)

    def forward(self, feature: Tensor) -> Tensor:
        memory = self.embed(feature)
        x = self.global_proj(multi_level_pool(tokens_to_map(memory, self.grid, self.grid), self.tokens))
        for layer in self.transformer:
            x = layer(x, self.latent_token_positional_embedding, memory, self.positional_embedding)
        return self.conv_out(tokens_to_map(self.ln_post(x), 1, self.tokens))


class PlainDecoder(PlainTransformer):
    def __init__(self, config: TokenizerConfig):
        super().__init__(config, config.decoder_size, "decoder_embed", 3)
        self.grid, self.head, width = config.grid, config.semantic_head, config.decoder_size.width
        if self.head:
            self.distill_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width),
                                             nn.SiLU(), nn.Linear(4 * width, self.head.teacher_width))

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        memory, semantic = self.embed(latent), None
        x = memory[:1].expand(self.grid**2, -1, -1)
        for depth, layer in enumerate(self.transformer, 1):
            x = layer(x, self.positional_embedding, memory, self.latent_token_positional_embedding)
            if self.head and depth == self.head.depth:
                semantic = self.distill_mlp(x).transpose(0, 1)
        return self.conv_out(tokens_to_map(self.ln_post(x), self.grid, self.grid)), semantic


class PlainQuantizer(nn.Module):
    """Holds all N x K distances, and with the entropy term their softmax."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))
        self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW, dtype=torch.int32))

    def forward(self, latent: Tensor, entropy: bool) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(latent.device.type, enabled=False):
            unit = F.normalize if self.config.l2_normalized else lambda x, dim: x
            z = unit(latent.float().permute(0, 2, 3, 1).flatten(0, 2), dim=1)
            codes = unit(self.embedding, dim=1)
            distances = z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.t()
            nearest = distances.argmin(1)
            terms = {"codebook": F.mse_loss(codes[nearest], z.detach()),
                     "commitment": F.mse_loss(z, codes[nearest].detach())}
            if entropy:
                logits = -distances / TEMPERATURE
                p, log_p = logits.softmax(1), logits.log_softmax(1)
                mean = p.mean(0)
                terms["entropy"] = (mean * (mean + 1e-5).log()).sum() - (p * log_p).sum(1).mean()
            through = rotate if self.config.gradient == "rotation" else straight_through
            quantized = through(z, codes[nearest].detach())
        b, _, h, w = latent.shape
        self.record(nearest)
        return quantized.view(b, h, w, -1).permute(0, 3, 1, 2), terms

    @torch.no_grad()
    def record(self, nearest: Tensor) -> None:
        self.codebook_used.copy_(torch.cat([self.codebook_used[len(nearest):].clone(), nearest.int()]))


class PlainTokenizer(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        z, dim = config.z_channels, config.quantizer.codebook_dim
        self.cnn_encoder, self.cnn_decoder = PlainCNNEncoder(config.cnn, z), PlainCNNDecoder(config.cnn, z)
        self.encoder, self.decoder = PlainEncoder(config), PlainDecoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)
        self.quantizer = PlainQuantizer(config.quantizer)


# The step


def plain_discriminator(config: AdversarialConfig) -> nn.Module:
    """PatchGAN with the parameter names of the package's."""
    widths = [config.base_channels * min(2**level, 8) for level in range(config.layers + 1)]
    modules = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for level, (before, after) in enumerate(itertools.pairwise(widths), 1):
        modules += [nn.Conv2d(before, after, 4, 2 if level < config.layers else 1, 1, bias=False),
                    nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    return nn.ModuleDict({"main": nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))})


class PlainLPIPS(nn.Module):
    """LPIPS by its formula, with the frozen VGG features and heads of another."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.scale, self.features = other.scaling_layer, other.features
        self.heads = nn.ModuleList(other.get_submodule(f"lin{index}.model") for index in range(len(READOUTS)))

    def stages(self, x: Tensor) -> list[Tensor]:
        found, x = [], self.scale(x)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in READOUTS:
                found.append(F.normalize(x, dim=1, eps=1e-10))
        return found

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self.heads, self.stages(images), self.stages(reconstruction), strict=False)
            return sum(head((ours - theirs).square()).mean() for head, ours, theirs in pairs)


class PlainStep:
    """The step of a recipe on one device; call it with images (B, 3, S, S) and the step's number."""

    def __init__(self, recipe: TokenizerRecipe, perceptual: nn.Module, teacher: nn.Module | None, device: torch.device):
        self.recipe, self.device, self.teacher = recipe, device, teacher
        self.autocast = {"fp32": None, "bf16": torch.bfloat16}[recipe.training.precision]
        self.generator = PlainTokenizer(recipe.model).to(device)
        self.perceptual = PlainLPIPS(perceptual)
        self.networks = {"generator": self.generator}
        if recipe.loss.adversarial:
            self.networks["discriminator"] = plain_discriminator(recipe.loss.adversarial).to(device)
        options = recipe.optimizer
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), lr=options.lr, betas=options.betas, eps=options.eps,
                                    weight_decay=options.weight_decay) for name, network in self.networks.items()}
        self.norms: dict[str, Tensor] = {}

    def judge(self, images: Tensor) -> Tensor:
        return self.networks["discriminator"]["main"](images)

    def __call__(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """One update of the generator and, if it is active, the discriminator; the weighted terms by our names."""
        adversarial = self.recipe.loss.adversarial
        judging = adversarial is not None and step >= adversarial.start_step
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            terms, made = self.generator_terms(images, step, judging)
        self.update("generator", sum(terms.values()))
        terms = {f"loss/{name}": value for name, value in terms.items()}
        if judging:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                terms |= self.discriminator_terms(images, [image.detach() for image in made])
            judged = sum(value for name, value in terms.items() if name.startswith("discriminator/"))
            self.update("discriminator", judged)
        return terms

    def generator_terms(self, images: Tensor, step: int, judging: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
        loss, network = self.recipe.loss, self.generator
        feature = network.cnn_encoder(images)
        entropy = loss.quantizer.entropy > 0 and step < (loss.quantizer.entropy_end_step or step + 1)
        quantized, latent_terms = network.quantizer(network.quant_conv(network.encoder(feature)), entropy)
        decoded, semantic = network.decoder(network.post_quant_conv(quantized))
        made = {"": network.cnn_decoder(decoded)}
        helping = loss.auxiliary and step < loss.auxiliary.end_step
        if helping and loss.auxiliary.direct_reconstruction:
            made["direct_"] = network.cnn_decoder(feature)
        terms = {}
        for prefix, image in made.items():
            terms[f"{prefix}reconstruction"] = loss.reconstruction.weight * F.mse_loss(image.float(), images)
            terms[f"{prefix}perceptual"] = loss.perceptual.weight * self.perceptual(images, image.float())
            if judging:
                terms[f"{prefix}adversarial"] = -loss.adversarial.weight * self.judge(image).float().mean()
        terms |= {name: getattr(loss.quantizer, name) * value for name, value in latent_terms.items()}
        if helping:
            terms["feature"] = loss.auxiliary.feature_weight * F.mse_loss(decoded.float(), feature.detach().float())
        if loss.semantic:
            similarity = F.cosine_similarity(semantic.float(), self.teacher(images), dim=2)
            terms["semantic"] = -loss.semantic.weight * similarity.mean()
        return terms, list(made.values())

    def discriminator_terms(self, images: Tensor, made: list[Tensor]) -> dict[str, Tensor]:
        real, weight = self.judge(images), self.recipe.loss.adversarial.weight
        names = ("discriminator/discriminator", "discriminator/direct_discriminator")
        return {name: weight * 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + self.judge(image).float()).mean())
                for name, image in zip(names, made, strict=False)}

    def update(self, name: str, loss: Tensor) -> None:
        optimizer, network = self.optimizers[name], self.networks[name]
        optimizer.zero_grad()
        loss.backward()
        self.norms[name] = nn.utils.clip_grad_norm_(network.parameters(), self.recipe.optimizer.max_grad_norm)
        optimizer.step()
