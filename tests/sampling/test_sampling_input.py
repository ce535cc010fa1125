"""What goes into sampling and encoding is checked: numbers that are none, types, empty batches, autocast."""

import math

import pytest
import torch
from small_models import small_gpt, small_tokenizer

import gigatok_ds
from gigatok_ds.cli.main import build_parser, main, parse
from gigatok_ds.errors import InputError
from gigatok_ds.sampling.generate import Sampler
from gigatok_ds.sampling.logits import FAILED, Choice, as_tokens, choose_codes

CLASSES = torch.tensor([1, 0, 2])


@pytest.fixture
def gpt():
    return small_gpt().eval()


def at(gpt, position, value, monkeypatch, row=1):
    """Logits of one row are `value` at one position."""
    step = gpt.decode_step

    def broken(tokens, place, *rest):
        logits = step(tokens, place, *rest)
        if int(place) == position:
            logits = logits.clone()
            logits[row, 3] = value
        return logits

    monkeypatch.setattr(gpt, "decode_step", broken)
    # The copy with packed layers, which a CPU would decode with, has a decode_step of its own.
    monkeypatch.setattr("gigatok_ds.cpu.packed_gpt.can_pack", lambda _: False)


@pytest.mark.parametrize("settings",
                         [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.1}, {"cfg_scale": 2.0}])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told_with_their_position(gpt, settings, place, value, monkeypatch):
    length = gpt.config.sequence_length
    position = {"first": 0, "middle": length // 2, "last": length - 1}[place]
    at(gpt, position, value, monkeypatch)
    with pytest.raises(InputError, match=rf"the logits of code {position} of image 8 are not finite \(of 1 of 3 "
                                         r"images\).*NaN"):
        gigatok_ds.generate(gpt, CLASSES, images=[7, 8, 9], **settings)


def test_a_code_that_failed_is_marked_without_looking_at_it():
    """On tensors without storage, whose values nobody can read: what is in a step must not wait for the device."""
    with torch.device("meta"):
        logits, uniform = torch.empty(2, 5), torch.empty(2, dtype=torch.float64)
    for top_k, top_p in ((0, 1.0), (1, 1.0), (3, 0.9)):
        assert as_tokens(choose_codes(logits, uniform, Choice(1.0, top_k, top_p))).is_meta
    found = choose_codes(torch.tensor([[0.0, math.nan], [1.0, 0.0]]), torch.tensor([0.5, 0.0], dtype=torch.float64),
                         Choice())
    assert found.tolist() == [FAILED, 0] and as_tokens(found).tolist() == [0, 0]


def test_weights_that_are_not_finite_end_a_command_in_one_line(gpt, tmp_path, capsys):
    from gigatok_ds.checkpoint.standalone import save_standalone

    weights = {name: value.clone() for name, value in gpt.state_dict().items()}
    weights["norm.weight"][0] = math.nan
    save_standalone(tmp_path / "gpt", gpt.config, weights)
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tokenizer", tokenizer.config, tokenizer.state_dict())
    with pytest.raises(InputError, match="the logits of code 0 of image 0 are not finite"):
        gigatok_ds.generate(gigatok_ds.load_gpt(tmp_path / "gpt"), CLASSES)
    for words, said in ((["--cfg", "inf"], "cfg_scale is inf"), (["--cfg", "nan"], "cfg_scale is nan"),
                        (["--temperature", "nan"], "temperature is nan"),
                        (["--temperature", "inf"], "temperature is inf"), (["--top-p", "nan"], "top_p is nan"),
                        (["--cfg-schedule", "step", "--cfg-start", "nan"], "gives scales that are not finite")):
        code = main(["sample", "--gpt", str(tmp_path / "gpt"), "--tokenizer", str(tmp_path / "tokenizer"), "--classes",
                     "1", "--out", str(tmp_path / "grid.png"), *words])
        told = [line for line in capsys.readouterr().err.splitlines() if line and "0/1" not in line]  # without the bar
        assert code == 2 and len(told) == 1 and said in told[0], told
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("words, said", [
    (["--classes", "1", "--cfg", "nan"], "cfg_scale is nan"), (["--count", "3", "--cfg", "0"], "cfg_scale is 0"),
    (["--count", "3", "--temperature", "nan"], "temperature is nan"),
    (["--classes", "1", "--top-k", "-1"], "top_k is -1"),
    (["--count", "3", "--top-p", "0"], "top_p is 0"), (["--count", "3", "--batch-size", "0"], "batch_size is 0"),
    (["--count", "3", "--cfg-interval", "-2"], "cfg_interval is -2"), (["--count", "0"], "count is 0"),
    (["--classes", "1", "--per-class", "0"], "per_class is 0"),
    (["--classes", "1", "--cfg-schedule", "step"], "cfg_schedule 'step'"),
])
def test_numbers_are_refused_before_models_are_loaded(words, said, tmp_path, capsys):
    code = main(["sample", "--gpt", str(tmp_path / "none"), "--tokenizer", str(tmp_path / "none"), "--out",
                 str(tmp_path / "x.png"), *words])
    assert code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("settings, said", [
    ({"cfg_scale": math.nan}, "cfg_scale is nan"), ({"cfg_scale": math.inf}, "cfg_scale is inf"),
    ({"cfg_scale": 2.0, "cfg_schedule": "triangular", "cfg_schedule_kwargs": {"peak": 1.0}}, "triangular"),
    ({"cfg_scale": 2.0, "cfg_schedule": "triangular", "cfg_schedule_kwargs": {"peak": math.nan}}, "triangular"),
    ({"temperature": math.nan}, "temperature is nan"), ({"temperature": -math.inf}, "temperature is -inf"),
    ({"top_p": math.nan}, "top_p is nan"), ({"top_k": 1.5}, "top_k is 1.5"),
])
def test_numbers_that_are_none_are_refused(gpt, settings, said):
    with pytest.raises(InputError, match=said):
        gigatok_ds.generate(gpt, CLASSES, **settings)


def test_autocast_changes_nothing(gpt):
    plain = gigatok_ds.generate(gpt, CLASSES, cfg_scale=1.5)
    tokenizer = small_tokenizer().eval()
    images = torch.rand(2, 3, tokenizer.config.image_size, tokenizer.config.image_size) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gigatok_ds.generate(gpt, CLASSES, cfg_scale=1.5), plain)
        assert torch.is_autocast_enabled("cpu")
        codes = tokenizer.encode(images)
        assert codes.shape == (2, tokenizer.config.latent_tokens) and tokenizer.decode(codes).shape == images.shape


def test_an_empty_batch_is_an_empty_result(gpt):
    assert gigatok_ds.generate(gpt, torch.empty(0, dtype=torch.long)).shape == (0, gpt.config.sequence_length)
    assert gigatok_ds.generate(gpt, []).shape == (0, gpt.config.sequence_length)
    tokenizer = small_tokenizer()
    size, tokens = tokenizer.config.image_size, tokenizer.config.latent_tokens
    codes = tokenizer.encode(torch.empty(0, 3, size, size))
    assert codes.shape == (0, tokens) and tokenizer.decode(codes).shape == (0, 3, size, size)
    with pytest.raises(InputError, match="this tokenizer takes"):
        tokenizer.encode(torch.empty(0, 3, size, size + 1))
    assert Sampler(gpt, 2).codes(torch.empty(0, dtype=torch.long), []).shape == (0, gpt.config.sequence_length)


@pytest.mark.parametrize("images, said", [
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "images are of type uint8; expected are .* in .-1, 1.*127.5"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "images are of type int64"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.bool), "images are of type bool"),
    (torch.full((1, 3, 16, 16), 255.0), "images hold values from 255 to 255; expected"),
    (torch.full((1, 3, 16, 16), math.nan), "images hold values from nan"),
    (torch.full((1, 3, 16, 16), -math.inf), "images hold values from -inf"),
])
def test_images_of_another_range_are_refused(images, said):
    tokenizer = small_tokenizer()
    images = images[:, :, :1, :1].expand(-1, -1, tokenizer.config.image_size, tokenizer.config.image_size)
    with pytest.raises(InputError, match=said):
        tokenizer.encode(images)


WORDS = {"convert": ["a", "b"], "sample": ["--gpt", "g", "--tokenizer", "t", "--classes", "1", "--out", "o"],
         "evaluate": ["loss", "a"], "search-guidance": []}


def test_every_type_has_both_names_in_every_command(capsys):
    found = {name for name, command in build_parser()._subparsers._group_actions[0].choices.items()
             if any("--dtype" in action.option_strings for action in command._actions)}
    assert found == WORDS.keys()
    command = build_parser()._subparsers._group_actions[0].choices
    for name in found:
        action, = (action for action in command[name]._actions if "--dtype" in action.option_strings)
        for one, other in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
            assert action.type(one) == action.type(other) in action.choices
    with pytest.raises(SystemExit) as caught:
        parse(["convert", *WORDS["convert"], "--dtype", "int8"])
    assert caught.value.code == 2 and "invalid choice: 'int8'" in capsys.readouterr().err
