"""scripts/bench/unsloth_step.py runs beside no transformers that Unsloth does not work with."""

from importlib import metadata

import pytest

NEEDS = ["torch>=2.4.0", "transformers!=5.1.0,<=5.17.0,>=4.52.4", 'transformers<=5.0.0; extra == "old"']


@pytest.mark.parametrize(("here", "fits"), [("5.17.0", True), ("5.23.0", False), ("5.1.0", False)])
def test_transformers_is_one_that_unsloth_names(bench_module, monkeypatch, here, fits):
    script = bench_module("unsloth_step")
    monkeypatch.setattr(metadata, "version", {"transformers": here}.get)
    monkeypatch.setattr(metadata, "requires", {"unsloth": NEEDS}.get)
    if fits:
        script.check_transformers()
        return
    with pytest.raises(SystemExit, match=rf"<=5\.17\.0.*found {here}"):
        script.check_transformers()
