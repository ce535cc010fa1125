"""The digits: real, split once and for all, and easy for the classifier that judges samples."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gigatok_ds.demo.digits import CLASSES, digits_splits
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.classifier import ImageClassifier
from gigatok_ds.packing.shard_writer import write_shards

TEST_KEYS = "bb1c583e8df6110c"


@pytest.fixture(scope="module")
def splits():
    return digits_splits()


def pixels(sample):
    return np.array(Image.open(io.BytesIO(sample.image_bytes)))


def as_batch(samples):
    images = torch.from_numpy(np.stack([pixels(sample) for sample in samples])).permute(0, 3, 1, 2).float()
    return images / 127.5 - 1, np.array([sample.label for sample in samples])


def test_every_digit_is_in_exactly_one_split(splits):
    train, test = ([sample.key for sample in split] for split in splits)
    assert not set(train) & set(test)
    assert sorted(train + test) == [f"digit-{number:04d}" for number in range(1797)]
    assert list("0123456789") == CLASSES


def test_the_split_is_stratified(splits):
    totals = np.bincount(load_digits().target)
    held_out = np.bincount([sample.label for sample in splits[1]])
    assert held_out.tolist() == [round(0.2 * total) for total in totals]


def test_the_split_is_stable(splits):
    assert hashlib.sha256(" ".join(sample.key for sample in splits[1]).encode()).hexdigest()[:16] == TEST_KEYS
    again = digits_splits()
    assert again[0] == splits[0] and again[1] == splits[1]
    other = digits_splits(8, seed=1)[1]
    assert {sample.key for sample in other} != {sample.key for sample in splits[1]}


def test_images_are_the_data_sets_own(splits):
    data = load_digits()
    for size, samples in ((32, splits[0]), (8, digits_splits(8)[0])):
        for sample in samples[::97]:
            image, number = pixels(sample), int(sample.key[-4:])
            assert sample.label == data.target[number] and sample.extension == "png"
            assert image.shape == (size, size, 3) and (image[..., :1] == image).all()
            blocks = image[..., 0].reshape(8, size // 8, 8, size // 8).mean(axis=(1, 3))
            # At the data's own size only rounding remains; bicubic enlargement smooths over neighbours.
            correlation = np.corrcoef(blocks.ravel(), data.images[number].ravel())[0, 1]
            assert correlation > (0.98 if size == 32 else 0.9999)


def test_they_can_be_written_as_shards(splits, tmp_path):
    written = write_shards(splits[1], tmp_path / "test", prefix="digits", classes=CLASSES)
    assert written.count == len(splits[1])


def test_the_classifier_knows_digits(splits):
    (train, train_labels), (test, test_labels) = map(as_batch, splits)
    classifier = ImageClassifier.fit(train, train_labels, len(CLASSES))
    accuracy = classifier.accuracy(test, test_labels)
    print(f"accuracy on {len(test)} held-out digits: {accuracy:.4f}")
    assert accuracy >= 0.97
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(test_labels))
    assert classifier.accuracy(test, shuffled) < 0.2, "about one in ten by chance"


@pytest.mark.parametrize("arguments, message", [({"image_size": 0}, "image size is 0"),
                                                ({"test_fraction": 1.0}, "test fraction is 1.0"),
                                                ({"test_fraction": 0.0}, "test fraction is 0.0")])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        digits_splits(**arguments)
