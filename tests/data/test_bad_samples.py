"""Samples that cannot be used: replaced, counted by tar, told at a bounded rate, and too many of them end the run."""

import logging

import pytest
from reading_plans import planned
from small_shards import incomplete_tars, plain_tar, samples, with_bad_images
from training_runs import prepare, start

from gigatok_ds.data import bad_samples
from gigatok_ds.data.bad_samples import BadSample, BadSamples
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.errors import InputError
from gigatok_ds.shards.index import ShardIndex


def batches(index, **arguments):
    settings = {"seed": 0, "global_batch_size": 5, "micro_batch_size": 5, "shuffle": False}
    return planned(ImageBatches, index, training_transform(16), **settings | arguments)


def refusal(call):
    """What the InputError says; it is not kept, because its traceback would keep the data workers."""
    try:
        call()
    except InputError as error:
        return str(error)
    raise AssertionError("no InputError")


@pytest.fixture
def index(tmp_path):
    return with_bad_images(tmp_path / "shards", bad=range(0, 40, 2), count=45, tars=3)


def test_each_is_told_once_and_after_ten_in_sums(index, caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bad_samples.time, "monotonic", lambda: now[0])
    found = BadSamples(index, None, 45)
    for sample in range(0, 18, 2):
        found.add([BadSample(sample, f"sample {sample} is bad")] * 2, read=1, replaced=1)
    found.add([BadSample(0, "sample 0 is bad")], read=1, replaced=1)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"sample {sample} is bad" for sample in range(0, 18, 2)]
    caplog.clear()
    for sample in range(18, 30, 2):  # the tenth, then one sum for all that come within a minute
        found.add([BadSample(sample, f"sample {sample} is bad")], read=1, replaced=1)
    assert len(caplog.records) == 2
    assert caplog.records[1].getMessage() == (
        "11 samples could not be used so far: 8 in x0.tar, 3 in x1.tar (the last: sample 20 is bad)")
    now[0] = 61.0
    found.add([BadSample(38, "sample 38 is bad")], read=1, replaced=1)
    assert len(caplog.records) == 3 and "16 samples" in caplog.records[2].getMessage()


def test_a_summary_names_the_worst_tars(tmp_path):
    index = with_bad_images(tmp_path / "shards", bad=(), count=60, tars=6)
    found = BadSamples(index, None, 60)
    found.add([BadSample(i, f"{i} is bad") for i in (0, 10, 11, 12, 20, 21, 30, 40)], read=9, replaced=8)
    assert found.summary() == "3 in x1.tar, 2 in x2.tar, 1 in x0.tar and 2 more shards (the last: 40 is bad)"


@pytest.mark.parametrize("limit, survives", [(0.0, 0), (0.1, 4), (0.25, 11), (1.0, 1000), (None, 1000)])
def test_the_limit_is_a_fraction_of_an_epoch_at_least(index, limit, survives):
    found = BadSamples(index, limit, per_epoch=45)
    for number in range(1, 41):
        if number <= survives:
            found.add([BadSample(2, "bad")], read=1, replaced=1)
        else:
            with pytest.raises(InputError, match=rf"^{number} of {number} samples could not be used, more than "
                                                 rf"data.max_bad_fraction {limit:g} allows: 1 in x0.tar"):
                found.add([BadSample(2, "bad")], read=1, replaced=1)
            break


def test_the_limit_is_a_fraction_of_what_is_read_over_many_epochs(index):
    found = BadSamples(index, 0.1, per_epoch=45)
    for _ in range(100):  # one in ten is just allowed
        found.add([BadSample(2, "bad")], read=10, replaced=1)
    with pytest.raises(InputError):
        found.add([BadSample(2, "bad")], read=1, replaced=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_end_the_run_in_one_line(index, workers, caplog):
    with caplog.at_level(logging.WARNING):
        text = refusal(lambda: list(batches(index, workers=workers, max_bad_fraction=0.2, stop_step=9)))
    assert text.startswith("10 of 20 samples") and "8 in x0.tar, 2 in x1.tar" in text and "check-shards" in text
    assert "\n" not in text and len(caplog.records) == 10 and "shards/x0.tar" in caplog.text
    assert len(list(batches(index, workers=workers, max_bad_fraction=0.5, stop_step=9))) == 9


def labelled(tmp_path, labels):
    members = [member for sample, label in zip(samples(len(labels)), labels, strict=True) for member in (
        (f"{sample.key}.jpg", sample.image_bytes), (f"{sample.key}.cls", str(label).encode()))]
    return ShardIndex.open(plain_tar(tmp_path / "shards" / "x.tar", members))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_the_model_does_not_have_ends_the_run_whatever_may_be_bad(tmp_path, workers):
    index = labelled(tmp_path, [7 if number in (3, 4) else 0 for number in range(20)])
    for refused in (lambda: index.check_labels(7, max_bad_fraction=1.0),
                    lambda: batches(index, num_classes=7, workers=workers, max_bad_fraction=1.0)):
        with pytest.raises(InputError, match=r"'s0003' has label 7; a model with num_classes 7 allows 0 to 6 \(2 such "
                                             r"samples\): labels go up to 7; set model.num_classes to at least 8"):
            refused()


def test_labels_that_are_counted_from_one_are_told(tmp_path):
    """One of 1,000 balanced classes is just as many as may be bad."""
    index = labelled(tmp_path, range(1, 1001))
    with pytest.raises(InputError, match="labels 1 to 1000 are counted from 1, and must be from 0"):
        batches(index, num_classes=1000, max_bad_fraction=0.001)
    index.check_labels(1001)


def test_data_without_any_label_is_refused(tmp_path):
    members = [(f"{sample.key}.jpg", sample.image_bytes) for sample in samples(6)]
    index = ShardIndex.open(plain_tar(tmp_path / "shards" / "x.tar", members))
    with pytest.raises(InputError, match="shards has no labels, which are needed here"):
        batches(index, num_classes=3, max_bad_fraction=1.0)
    batch = next(iter(batches(index, global_batch_size=6, micro_batch_size=6)))  # where none is asked for
    assert batch["labels"].tolist() == [-1] * 6 and not batch["replaced"].any()


@pytest.mark.parametrize("classes, replaced", [(3, {0: "s0000", 8: "s0009", 9: "s0002"}), (None, {9: "s0002"})])
def test_samples_without_label_or_data_are_replaced(tmp_path, classes, replaced):
    """Without a label, only where labels are asked for."""
    index = ShardIndex.open(incomplete_tars(tmp_path), max_bad_fraction=0.5)
    loader = batches(index, global_batch_size=12, micro_batch_size=12, stop_step=1, num_classes=classes)
    batch, = loader
    assert batch["replaced"].nonzero().flatten().tolist() == list(replaced)
    assert [index.key(sample) for sample in loader.bad_samples.reasons] == list(replaced.values())
    assert classes is None or batch["labels"].min() >= 0


def test_a_training_run_ends_with_the_summary(tmp_path):
    data = prepare(tmp_path)["tokenizer"]
    with_bad_images(tmp_path / "bad", bad=range(0, 40, 2), count=45, tars=3)
    arguments = [tmp_path / "tokenizer.yaml", *data, f"data.train={tmp_path / 'bad'}", "training.steps=2"]
    code, output = start([*arguments, "--out", tmp_path / "run"])
    assert code == 2 and "Traceback" not in output, output
    assert "samples could not be used, more than data.max_bad_fraction 0.001 allows" in output
    code, output = start([*arguments, "--out", tmp_path / "run", "data.max_bad_fraction=0.6"])
    assert code == 0 and "its neighbour takes its place" in output, output
