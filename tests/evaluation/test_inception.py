"""The Inception network: torch-fidelity's own features, from a file read as plain data; nothing is downloaded."""

import os
import socket
import sys

import pytest
import torch
from golden_weights import image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import to_uint8
from gigatok_ds.evaluation.inception import FEATURES, load_inception, origin_of

SETTING = "validation.inception"


@pytest.fixture(scope="module")
def inception():
    return load_inception("random", SETTING)


@pytest.fixture(scope="module")
def weights(inception, tmp_path_factory):
    """A file like the published one, which has no counters of training steps."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    state = inception.network.state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches_tracked" not in name}, path)
    return path


def images(count=3, size=40):
    return torch.as_tensor(image("test_inception", (count, 3, size, size)))


def test_features_are_those_of_torch_fidelity(inception, weights):
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights))
    ours = load_inception(weights, SETTING)
    expected = theirs(to_uint8(images()))[0]
    assert expected.shape == (3, FEATURES) and expected.std() > 0.01
    assert torch.equal(ours(images()), expected) and torch.equal(inception(images()), expected)


def test_images_count_as_files_hold_them(inception):
    x = images(1)
    rounded = (to_uint8(x).float() - 127.5) / 127.5
    assert torch.equal(inception(3 * x), inception((3 * x).clamp(-1, 1)))
    assert torch.equal(inception(rounded), inception(x)) and not torch.equal(inception(rounded), inception(-x))
    assert not inception(x.requires_grad_()).requires_grad


def test_random_weights_are_always_the_same_and_leave_torchs_generator_alone(inception):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = load_inception("random", SETTING).network.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in inception.network.state_dict().items())


def test_nothing_is_downloaded(monkeypatch, weights):
    def refused(*_):
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    load_inception(weights, SETTING)


def test_other_files_are_refused(tmp_path, inception):
    with pytest.raises(InputError, match=f"{SETTING}: there is no file .*missing.pth; it should be .*6726825d.pth"):
        load_inception(tmp_path / "missing.pth", SETTING)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(InputError, match=f"{SETTING}: .*cut.pth cannot be read"):
        load_inception(tmp_path / "cut.pth", SETTING)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=f"{SETTING}: .*other.pth should be .* holds another network"):
        load_inception(tmp_path / "other.pth", SETTING)


def test_a_file_with_code_in_it_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"fc.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load_inception(tmp_path / "bomb.pth", SETTING)
    assert not (tmp_path / "executed").exists()


def test_a_missing_package_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"torch-fidelity; pip install 'gigatok_ds\[eval\]'"):
        load_inception("random", SETTING)


def test_the_origin_of_weights_is_told(weights):
    told = origin_of(weights, SETTING)
    assert "SHA-256" in told and "not weights-inception-2015-12-05-6726825d.pth" in told
    assert "random weights" in origin_of("random", SETTING)
