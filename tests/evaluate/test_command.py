"""What the commands of evaluation share."""

import dataclasses

import pytest

from jaxtune.evaluate.command import run_command


@dataclasses.dataclass
class Settings:
    name: str = "a"
    token: str | None = None
    traceback: bool = False


@pytest.mark.parametrize("given", [["--token", "hf_secret"], ["--token=hf_secret"]])
def test_the_token_is_not_in_the_command_that_is_written_down(given):
    seen = []
    assert run_command("m", Settings, "", lambda *found: seen.append(found), [*given, "--name", "b"]) == 0
    ((settings, command),) = seen
    assert settings.token == "hf_secret" and settings.name == "b"
    assert command == "python -m m --name b"


def test_errors_are_one_line(capsys):
    def work(settings, command):
        raise ValueError("no\nsuch model")

    assert run_command("m", Settings, "", work, []) == 2
    assert capsys.readouterr().err == "error: no such model\n"
