"""Nothing that a run writes down or shows holds the users, passwords and signatures of where its data lies."""

import json

import pytest
from shard_server import Server
from training_runs import prepare, start

from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe, recipe_to_yaml, save_resolved
from gigatok_ds.config.location import masked
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring import observer
from gigatok_ds.training.run_checks import check_run

LOCATIONS = ["https://geheim:geheim@host/train", "s3://bucket/train?X-Amz-Signature=geheim",
             "https://host/a.tar?t=geheim::https://host/b.tar",
             "pipe:curl -H 'Authorization: Bearer geheim' https://host/x-{0..3}.tar",
             "https://host/x-{0..3}.tar?sig=geheim",
             "pipe:curl -u me:geheim https://host/x-{0..3}.tar", "pipe:curl --user='me:geheim' "
                                                                 "https://host/x-{0..3}.tar",
             "pipe:AWS_SECRET_ACCESS_KEY=geheim aws s3 cp s3://bucket/x-{0..3}.tar -",
             "pipe:get --password=geheim x-{0..3}.tar"]


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Arguments of a run whose training data comes from a server, by a location with a signature."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(tmp_path)
    server = Server(tmp_path / "codes")
    steps = ["training.steps=2", "checkpoint.every=2", "training.validate_every=2", "schedule.warmup_steps=0"]
    yield [f"data.train={server.url}?X-Amz-Signature=geheim", f"data.validation={tmp_path / 'test_codes'}", *steps]
    server.close()


def words(folder):
    """Everything that the files below a folder hold, but for tensors."""
    return "".join(path.read_text(errors="replace") for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_run_keeps_no_secret_and_goes_on_when_it_is_given_again(remote, tmp_path):
    run = tmp_path / "run"
    code, output = start([tmp_path / "gpt.yaml", "--out", run, *remote])
    assert code == 0, output
    assert (run / "checkpoints" / "step-0000002" / "recipe.yaml").is_file() and "geheim" not in words(run) + output
    (run / "checkpoints" / "step-0000002" / "state.json").unlink()
    code, output = start([run / "recipe.yaml", "--out", run])
    assert code == 2 and "data.train is http://127.0.0.1:" in output and "give data.train=..." in output, output
    assert len([line for line in output.splitlines() if "error" in line]) == 1 and "Traceback" not in output
    code, output = start([run / "recipe.yaml", "--out", run, remote[0]])
    assert code == 0 and (run / "checkpoints" / "step-0000002" / "state.json").is_file(), output
    assert "geheim" not in words(run) + output


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_recipe_is_kept_without_secrets_and_tells_what_it_lacks(location, tmp_path):
    quoted = json.dumps(location)
    recipe = load_recipe("GPT-B", [f"data.train={quoted}", "data.validation=val", f"data.second={quoted}"])
    save_resolved(recipe, tmp_path / "recipe.yaml")
    assert "geheim" in recipe_to_yaml(recipe) and "geheim" not in (tmp_path / "recipe.yaml").read_text()
    kept = load_recipe(tmp_path / "recipe.yaml", [f"data.train={quoted}"])
    with pytest.raises(InputError, match=r"data.second is .*\*\*\*.*give data.second=..."):
        check_run(kept, tmp_path / "run")
    assert load_recipe(tmp_path / "recipe.yaml", [f"data.train={quoted}", f"data.second={quoted}"]) == recipe


def test_words_that_are_no_secrets_are_shown():
    text = "train GPT-B model.latent_tokens=256 data.tokenizer=runs/token python -u x.py a:b https://host/x.tar"
    assert masked(text) == text


def test_local_paths_are_kept_as_they_are(tmp_path):
    recipe = load_recipe("GPT-B", ["data.train=/data/a b?c=d", "data.validation=s3://bucket/val"])
    save_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_neither_inspect_nor_weights_and_biases_are_told(tmp_path, capsys, monkeypatch):
    recipe = load_recipe("GPT-B",
                         ["data.train=https://geheim@host/x", "data.validation=val", "monitor.wandb_project=mine"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe_to_yaml(recipe))  # as runs before kept it
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    assert (
        json.loads(said := capsys.readouterr().out)["recipe"]["data"]["train"] == "https://***@host/x"
        and "geheim" not in said
    )
    monkeypatch.setattr(observer, "wandb_run", lambda *_, recipe, **__: recipe)
    assert "geheim" not in str(observer.wandb_of(recipe, tmp_path, type("First", (), {"is_first": True})))
