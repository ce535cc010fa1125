"""Predicted bytes against what training on gloo ranks really allocates."""

import pytest
from measured_memory import peak_bytes, settings_of
from rank_runs import run_ranks
from training_runs import prepare

from gigatok_ds.config.deepspeed import resolve_deepspeed
from gigatok_ds.config.load import load_recipe
from gigatok_ds.dry_run.by_layers import rehearse
from gigatok_ds.dry_run.dry_run import shapes_of
from gigatok_ds.planning.rank_memory import memory_of

MODELS = {
    "tokenizer": ["model.encoder={width: 128, layers: 4, heads: 4}", "model.decoder={width: 128, layers: 4, heads: 4}",
                  "training.ema_decay=0.9"],
    "gpt": ["model.size={width: 128, layers: 6, heads: 4}"],
}
STEP = 4  # the discriminator begins


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return folder, prepare(folder)


CASES = [(kind, precision, stage, tensor)
         for kind, precision in (("gpt", "bf16"), ("tokenizer", "bf16"), ("tokenizer", "fp32"))
         for stage in range(4) for tensor in (1, 2)
         if (precision, stage, tensor) != ("bf16", 0, 2)]  # refused by config.deepspeed
ALWAYS = [("gpt", "bf16", 1, 2), ("tokenizer", "bf16", 2, 1)]


@pytest.mark.parametrize("kind, precision, stage, tensor",
                         [pytest.param(*case, marks=[] if case in ALWAYS else pytest.mark.slow) for case in CASES])
def test_predicted_bytes(data, kind, precision, stage, tensor):
    check_prediction(data, kind, precision, stage, tensor)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("parts", ["cnn_encoder, encoder, quant_conv, quantizer", "decoder"])
def test_predicted_bytes_with_frozen_parts(data, parts, stage):
    """At stage 3 DeepSpeed's linear layers keep their inputs, too, where only gradients of these are wanted."""
    rel = 0.15 if (parts, stage) == ("decoder", 3) else 0.1
    check_prediction(data, "tokenizer", "bf16", stage, 1, f"training.freeze=[{parts}]", rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "tensor"), [(0, 1), (2, 1), (3, 1), (1, 2)])
def test_predicted_bytes_with_adapters(data, stage, tensor):
    check_prediction(data, "gpt", "bf16", stage, tensor, "training.lora={rank: 8, alpha: 16}")


def check_prediction(data, kind, precision, stage, tensor, *more, rel=0.1):
    folder, names = data
    recipe = load_recipe(folder / f"{kind}.yaml", [*names[kind], *MODELS[kind], f"training.precision={precision}",
                                                   f"parallel.tensor={tensor}", "training.global_batch_size=32",
                                                   "training.micro_batch_size=8", *more])
    measured, elements = max(run_ranks(peak_bytes, 2, recipe, stage, STEP))
    settings, _ = resolve_deepspeed(settings_of(stage), recipe, data_parallel_size=2 // tensor)
    memory = memory_of(recipe, shapes_of(recipe), rehearse(recipe, 8, STEP).kept, zero=settings["zero_optimization"],
                       data_ranks=2 // tensor)
    assert shapes_of(recipe).elements + sum(map(sum, shapes_of(recipe).frozen_parts.values())) == elements
    assert memory.peak == pytest.approx(measured, rel=rel)
