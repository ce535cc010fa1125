"""The README's set-up commands are CI's. test_documented_commands.py runs the others, test_doc_pages.py looks at names.
"""

from places import ROOT


def test_ci_runs_the_command_that_the_readme_gives():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] in (ROOT / "README.md").read_text()
