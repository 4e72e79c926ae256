"""For tests of kernels."""

import pytest


@pytest.fixture(autouse=True)
def no_races(capsys):
    """Fails where the interpreter's race detector found something: it prints that, and nothing more comes of it."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
