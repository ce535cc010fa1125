"""Mixtures: exact shares, every sample of a source once in its epoch, the same whatever the ranks and restarts."""

import logging
import pickle

import numpy as np
import pytest
from reading_plans import planned
from small_shards import packed, plain_tar, with_bad_images

from gigatok_ds.cluster.share import Share
from gigatok_ds.config.load import load_recipe, recipe_to_yaml, without_secrets
from gigatok_ds.config.sources import DataSource, sources_of
from gigatok_ds.data import mixture as mixture_module
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.joined import join, open_each, open_sources
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.data.mixture import MixedBatches, Mixture
from gigatok_ds.data.order import Locality
from gigatok_ds.errors import InputError
from gigatok_ds.shards.index import ShardIndex

MIXTURES = [([50, 7, 300], [0.5, 0.2, 0.3]), ([1, 1], [1, 2]), ([20, 30, 40], [3, 1, 0.01]), ([9], [2.5]),
            ([100, 200], [0.1, 1e-6])]


def read(mixture, steps, seed=0, size=24, **options):
    batches = MixedBatches(Mixture(counts=mixture[0], weights=mixture[1]), size, seed, **options)
    return np.concatenate([batches.batch(step) for step in range(steps)])


def sources_in(mixture, samples):
    return np.searchsorted(np.cumsum(mixture[0]), samples, side="right")


@pytest.mark.parametrize("mixture", MIXTURES)
def test_shares_are_those_of_the_weights(mixture):
    """Within 1% of 10,000 draws, and of each thousand exact but for one."""
    samples = read(mixture, 10_000 // 20, size=20)
    wanted = np.array(mixture[1]) / sum(mixture[1])
    found = np.bincount(sources_in(mixture, samples), minlength=len(wanted))
    assert np.abs(found / 10_000 - wanted).max() < 0.01
    for start in range(0, 10_000, 1000):
        had = np.bincount(sources_in(mixture, samples[: start + 1000]), minlength=len(wanted))
        assert np.abs(had - wanted * (start + 1000)).max() <= 1


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_source_gives_each_sample_once_an_epoch_in_another_order_each_time(mixture):
    samples, start = read(mixture, 300), 0
    sources = sources_in(mixture, samples)
    for source, count in enumerate(mixture[0]):
        own = samples[sources == source]
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert (np.sort(epochs, axis=1) == np.arange(start, start + count)).all()
        assert count < 20 or len(epochs) < 2 or (epochs[0] != epochs[1]).any()
        start += count


def test_any_batch_is_found_from_its_number_alone():
    mixture = MIXTURES[0]
    samples = read(mixture, 200)
    for step in (0, 41, 42, 199):
        batches = MixedBatches(Mixture(counts=mixture[0], weights=mixture[1]), 24, 0)
        epochs, found = batches.locate(step)
        assert (found == samples[24 * step : 24 * step + 24]).all()
        for position, (epoch, sample) in enumerate(zip(epochs, found, strict=True), 24 * step):
            assert epoch == (samples[:position] == sample).sum()
    assert (read(mixture, 200, seed=1) != samples).any()


def test_in_order_and_with_tars_read_one_after_the_other():
    samples = read(([4, 6], [1, 1]), 2, size=10, shuffle=False)
    for source, count, start in ((0, 4, 0), (1, 6, 4)):
        own = samples[sources_in(([4, 6], [1, 1]), samples) == source]
        assert (own == start + np.arange(len(own)) % count).all()
    shards = np.repeat([0, 1, 2, 3], 10)  # two sources of two tars
    samples = read(([20, 20], [1, 1]), 10, size=4, locality=Locality(np.bincount(shards), 1))
    for source in (0, 1):
        own = samples[sources_in(([20, 20], [1, 1]), samples) == source][:20]
        assert len(set(shards[own[:10]])) == 1 and len(set(shards[own[10:]])) == 1


@pytest.fixture
def three(tmp_path):
    """Sources of which two know the same class."""
    parts = {"pets": packed(tmp_path, "pets", ["cat", "dog"]), "zoo": packed(tmp_path, "zoo", ["cat", "zebra", "ape"]),
             "more": packed(tmp_path, "more", ["dog"])}
    return [DataSource(location=str(path), weight=weight, name=name)
            for (name, path), weight in zip(parts.items(), (2, 1, 0.5), strict=True)]


def test_a_joined_index_is_its_parts_one_after_the_other(three):
    index, mixture = open_sources(tuple(three), ShardIndex.open)
    parts = [ShardIndex.open(source.location) for source in three]
    assert mixture == Mixture(counts=[4, 6, 2], weights=[2, 1, 0.5]) and len(index) == 12
    assert index.classes == ["cat", "dog", "ape", "zebra"]
    flat = [(part, i) for part in parts for i in range(len(part))]
    index = pickle.loads(pickle.dumps(index))
    for number, (part, i) in enumerate(flat):
        assert index.read(number) == part.read(i) and index.key(number) == part.key(i)
        assert index.classes[index.label(number)] == part.classes[part.label(i)]
    assert index.place(5)[0] == "zoo/images-000000.tar" and index.caption(5) is None
    assert index.tars.name(index.place(5)[0]) == f"{three[1].location}/images-000000.tar"


def test_what_is_mixed_and_how_is_its_identity(three):
    identity = open_sources(tuple(three), ShardIndex.open)[0].identity()
    assert identity == open_sources(tuple(three), ShardIndex.open)[0].identity()
    others = [three[:2], three[::-1],
              [DataSource(location=source.location, name=source.name) for source in three]]
    assert len({identity, *(open_sources(tuple(other), ShardIndex.open)[0].identity() for other in others)}) == 4
    alone, mixture = open_sources(three[0].location, ShardIndex.open)
    assert mixture is None and alone.identity() == ShardIndex.open(three[0].location).identity()
    assert list(open_each(tuple(three), ShardIndex.open)) == ["pets", "zoo", "more"]


def test_numbers_beside_names_are_refused(three, tmp_path):
    numbered = plain_tar(tmp_path / "numbered/x.tar", [("a.jpg", b"x"), ("a.cls", b"1")])
    unlabelled = plain_tar(tmp_path / "unlabelled/x.tar", [("a.jpg", b"x")])
    both = [ShardIndex.open(three[0].location), ShardIndex.open(numbered)], ["pets", "numbered"]
    with pytest.raises(InputError, match="some name their classes and others number them"):
        join(*both)
    assert len(join(*both, labelled=False)) == 5
    index = join([ShardIndex.open(three[0].location), ShardIndex.open(unlabelled)], ["pets", "unlabelled"])
    assert index.labels.tolist() == [0, 0, 1, 1, -1]


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 0), (4, 1)])
def test_ranks_and_workers_do_not_matter(three, ranks, workers):
    index, mixture = open_sources(tuple(three), ShardIndex.open)

    def batches(share, workers, start):
        return list(planned(ImageBatches, index, training_transform(8), seed=3, mixture=mixture, workers=workers,
                            global_batch_size=8, micro_batch_size=8 // share.size, share=share, start_step=start,
                            stop_step=4))

    alone = [batch["images"] for batch in batches(Share(rank=0, size=1), 0, 0)]
    parts = [batches(Share(rank=rank, size=ranks), workers, 1) for rank in range(ranks)]
    for step, full in enumerate(alone[1:]):
        together = [image for part in parts for image in part[step]["images"]]
        assert all((ours == theirs).all() for ours, theirs in zip(together, full, strict=True))


def test_bad_samples_are_counted_by_source(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    parts = [with_bad_images(tmp_path / name, bad=bad, count=6) for name, bad in (("one", (1, 2)), ("two", (3,)))]
    index = join(parts, ["first", "second"])
    loader = planned(ImageBatches, index, training_transform(8), seed=0, max_bad_fraction=1.0, global_batch_size=12,
                     micro_batch_size=12, stop_step=1)
    assert sum(len(batch["images"]) for batch in loader) == 12
    assert loader.bad_samples.summary().startswith("2 of first, 1 of second, 2 in first/x0.tar, 1 in second/x0.tar")


LIST = "[{location: shards/a, weight: 3}, {location: 'https://me:secret@host/b', name: web}]"


def test_a_recipe_has_lists_of_places(tmp_path):
    recipe = load_recipe("VQ_SS256", [f"data.train={LIST}", "data.validation=val"])
    assert recipe.data.train == (DataSource(location="shards/a", weight=3),
                                 DataSource(location="https://me:secret@host/b", name="web"))
    assert [source.called for source in sources_of(recipe.data.train)] == ["a", "web"]
    (tmp_path / "again.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert "secret" not in recipe_to_yaml(without_secrets(recipe))


@pytest.mark.parametrize("value, said", [
    ("[]", "data.train is an empty list"),
    ("[{location: a, weight: 0}]", "the weight of a is 0.*must be above 0"),
    ("[{location: a, weight: -1}]", "must be above 0"),
    ("[{location: x/a}, {location: y/a}]", "2 places are called 'a'; give each a name of its own"),
    ("[{location: a, name: b/c}]", "a place is called 'b/c'; a name has no slashes"),
    ("[{weight: 1}]", "location"),
    ("[{location: a, wieght: 1}]", "wieght"),
    ("['https://me:secretsecretsecretsecretsecretsecretsecretsecretsecretsecret@host/b']", "data.train"),
    ("[{location: 'https://me:secretsecretsecretsecretsecretsecretsecretsecretsecret@host/b', weight: x}]", "weight"),
    ("3", "or a list of sections of location, weight, name"),
    ("{location: a}", "or a list of sections of location, weight, name"),
])
def test_lists_that_cannot_be_meant(value, said):
    with pytest.raises(InputError, match=said) as caught:
        load_recipe("VQ_SS256", [f"data.train={value}", "data.validation=val"])
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not str(caught.value).endswith((" of ", ";", "are "))


def test_the_order_of_a_source_is_made_once_an_epoch(monkeypatch):
    made = []
    monkeypatch.setattr(mixture_module, "epoch_order", lambda count, seed, epoch, locality: (
        made.append((count, epoch)), np.arange(count))[1])
    read(([1000, 2000], [0.005, 1]), 60, size=30)
    assert sorted(made) == [(1000, 0), (2000, 0)]


def test_a_second_set_of_codes_beside_a_mixture_is_refused():
    with pytest.raises(InputError, match=r"data.second is set, but data.train is a mixture already"):
        load_recipe("GPT-B", ["data.train=[{location: a}, {location: b}]", "data.validation=val", "data.second=c"])
