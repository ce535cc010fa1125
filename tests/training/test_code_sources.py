"""Where a GPT's codes come from: a frozen tokenizer's on the fly, and mixtures of two sets of code shards."""

import numpy as np
import pytest
import torch
from layout_runs import Layout, LayoutRuns, largest_differences
from one_rank import ALONE
from small_models import small_tokenizer
from training_runs import code_shards, prepare

from gigatok_ds import InputError, load_tokenizer
from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.cluster.share import Share
from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.data.codes import CodeBatches, CodeDataset
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches, evaluation_batches
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.streams import numpy_stream
from gigatok_ds.training.code_sources import check_sources, open_source
from gigatok_ds.training.run_checks import check_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recipes, images and codes, a tokenizer that fits them, and one that does not."""
    folder = tmp_path_factory.mktemp("sources")
    prepare(folder)
    for name, changes in (("tokenizer", {}), ("other", {"latent_tokens": 4})):
        tokenizer = small_tokenizer(**changes)
        save_standalone(folder / name, tokenizer.config, tokenizer.state_dict())
    return folder


def on_the_fly(folder):
    return [f"data.train={folder / 'images'}", f"data.validation={folder / 'test_images'}",
            f"data.tokenizer={folder / 'tokenizer'}"]


def extracted(folder, *more):
    return load_recipe(folder / "gpt.yaml", [f"data.train={folder / 'codes'}",
                                             f"data.validation={folder / 'test_codes'}", *more])


def test_codes_are_those_of_the_augmented_images(folder):
    recipe = load_recipe(folder / "gpt.yaml", on_the_fly(folder))
    source = open_source(recipe, ALONE, 4)
    tokenizer = load_tokenizer(folder / "tokenizer")
    images = iter(ImageBatches(ShardIndex.open(folder / "images"), training_transform(16),
                               ReadingPlan(global_batch_size=8, micro_batch_size=4), seed=recipe.training.seed))
    batches = source.micro_batches(0)
    seen = []
    for _ in range(6):
        expected, found = next(images), next(batches)
        assert torch.equal(found["codes"], tokenizer.encode(expected["images"])) and not found["codes"].requires_grad
        assert torch.equal(found["labels"], expected["labels"])
        assert torch.equal(found["position"], expected["position"])
        seen.append(found)
    resumed = next(source.micro_batches(2))
    assert all(torch.equal(resumed[name], seen[4][name]) for name in resumed)
    assert not source.tokenizer.training
    for parameter in source.tokenizer.parameters():
        assert not parameter.requires_grad and parameter.dtype == torch.float32


def test_validation_codes_are_those_of_the_center_crops(folder):
    source = open_source(load_recipe(folder / "gpt.yaml", on_the_fly(folder)), ALONE, 4)
    index = ShardIndex.open(folder / "test_images")
    (batch,) = evaluation_batches(index, 16, 11)
    codes, labels = source.validation()
    assert codes.shape == (11, 8) and labels.tolist() == index.labels.tolist()
    assert np.array_equal(codes, load_tokenizer(folder / "tokenizer").encode(batch["images"]).numpy())
    assert source.validation()[0] is codes, "encoded once"


def test_two_tensor_ranks_train_on_the_same_codes_as_one(folder, tmp_path):
    """Each encodes half of the images; losses, validation loss included, norms and weights to 1e-5."""
    runs = LayoutRuns(tmp_path)
    alone, together = (runs.result("gpt", Layout(tensor=size, stage=1), *on_the_fly(folder)) for size in (1, 2))
    assert max(largest_differences(together, alone)) < 1e-5
    validation = [line["validation/loss"] for line in together[0] if "validation/loss" in line]
    assert len(validation) == 1 and 0 < validation[0] < 4.2


def test_the_images_of_a_micro_batch_must_be_shared_evenly(folder):
    settings = [*on_the_fly(folder), "parallel.tensor=2", "training.micro_batch_size=1"]
    recipe = load_recipe(folder / "gpt.yaml", settings)
    with pytest.raises(InputError, match="micro batch of 1 images cannot be shared by 2 tensor ranks"):
        resolve_deepspeed(zero_settings(1), recipe, data_parallel_size=1)
    resolve_deepspeed(zero_settings(1), extracted(folder, *settings[3:]), data_parallel_size=1)


@pytest.mark.parametrize("settings, words", [
    (["data.tokenizer={folder}/other"], "other has latent_tokens 4, but tiny_gpt expects 8"),
    (["data.tokenizer={folder}/tokenizer", "model.vocab_size=128"], "has codebook_size 64, but tiny_gpt expects 128"),
    (["data.tokenizer={folder}/images"], "not a standalone checkpoint"),
    (["data.second={folder}/nothing"], "data.second is .*nothing, which is not a directory"),
])
def test_what_does_not_fit_is_refused_before_ranks_start(folder, tmp_path, settings, words):
    recipe = extracted(folder, *(setting.format(folder=folder) for setting in settings))
    with pytest.raises(InputError, match=words):
        check_run(recipe, tmp_path / "run")


def test_a_tokenizer_and_a_second_set_of_codes_exclude_each_other(folder):
    with pytest.raises(InputError, match="no code shards to mix"):
        extracted(folder, "data.second=x", "data.tokenizer=y")
    check_sources(extracted(folder))


def test_half_of_the_accesses_take_the_second_set(folder, tmp_path):
    first = CodeDataset.open(folder / "codes")
    code_shards(tmp_path / "second", 40, seed=5)
    second = CodeDataset.open(tmp_path / "second")
    batches = iter(CodeBatches(first, ReadingPlan(global_batch_size=8, micro_batch_size=4), second, seed=3))
    taken = []
    for batch in (next(batches) for _ in range(50)):
        for codes, epoch, sample in zip(batch["codes"], batch["epoch"].tolist(), batch["sample"].tolist(), strict=True):
            of_second = numpy_stream(3, "second codes", epoch, sample).random() < 0.5
            row = int(numpy_stream(3, "augmentation", epoch, sample).integers(2))
            assert codes.tolist() == (second if of_second else first).codes[sample, row].tolist()
            taken.append(of_second)
    assert len(taken) == 200 and 70 < sum(taken) < 130
    half = ReadingPlan(global_batch_size=8, micro_batch_size=4, share=Share(rank=1, size=2))
    share = iter(CodeBatches(first, half, second, seed=3))
    batches = iter(CodeBatches(first, ReadingPlan(global_batch_size=8, micro_batch_size=8), second, seed=3))
    assert torch.equal(next(share)["codes"], next(batches)["codes"][4:])


def test_a_second_set_must_be_of_the_same_images(folder, tmp_path):
    code_shards(tmp_path / "fewer", 39, seed=5)
    with pytest.raises(InputError, match=r"fewer is not of the same images as data.train .* 39 samples beside 40"):
        open_source(extracted(folder, f"data.second={tmp_path / 'fewer'}"), ALONE, 4)
    code_shards(tmp_path / "longer", 40, seed=5, tokens=9)
    with pytest.raises(InputError, match="longer has latent_tokens 9, but tiny_gpt expects 8"):
        open_source(extracted(folder, f"data.second={tmp_path / 'longer'}"), ALONE, 4)
