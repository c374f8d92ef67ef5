"""The examples of the README run, one after the other, as they stand there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a run
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert "relative error" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["python -m recipes fit --config recipes/digits.yaml", "pytest"])
def test_the_two_commands_are_there(command):
    assert f'pip install -e ".[dev]" && {command}\n' in README.read_text()
