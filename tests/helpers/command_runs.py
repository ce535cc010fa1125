"""`gigatok-ds` in this process: its exit code, the figures that it wrote, the line by which it refused."""

import json

from gigatok_ds.cli.main import main


def on_ranks(arguments):
    return main([str(argument) for argument in arguments])


def figures(out):
    return json.loads((out / "results.json").read_text())["figures"]


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]
