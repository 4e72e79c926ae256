import os
from pathlib import Path

import pytest

from jaxtune.export.folder import staged_folder
from jaxtune.hub import resolve

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")


def write(folder: Path, mark: str) -> None:
    (folder / "model.safetensors").write_text(mark)
    (folder / "tokenizer.json").write_text(mark)
    (folder / "config.json").write_text(mark)


def killed(work) -> None:
    """Run `work` in a child process that ends without any clean-up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_new_folder_appears_whole(tmp_path):
    with staged_folder(tmp_path / "deep" / "m", 0) as folder:
        write(folder, "new")
        assert not (tmp_path / "deep" / "m").exists()
    assert sorted(p.name for p in (tmp_path / "deep" / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "deep" / "m").stat().st_mode & 0o055 == 0o055


def test_process_killed_while_writing(tmp_path):
    """Neither a new target nor an old one is touched."""

    def work():
        with staged_folder(tmp_path / "m", 0) as folder:
            (folder / "model.safetensors").write_text("half")
            os._exit(9)

    killed(work)
    assert not (tmp_path / "m").exists()
    with staged_folder(tmp_path / "m", 0) as folder:
        write(folder, "old")
    killed(work)
    assert {p.read_text() for p in (tmp_path / "m").iterdir()} == {"old"}


def test_process_killed_while_replacing(tmp_path, monkeypatch):
    """Between the old files and the new ones no library finds a model there."""
    with staged_folder(tmp_path / "m", 0) as folder:
        write(folder, "old")
    replace, seen = Path.replace, []

    def count(self, target):
        seen.append(self)
        if len(seen) == 2:
            os._exit(9)
        return replace(self, target)

    def work():
        monkeypatch.setattr(Path, "replace", count)
        with staged_folder(tmp_path / "m", 0) as folder:
            write(folder, "new")

    killed(work)
    assert "new" in {file.read_text() for file in (tmp_path / "m").iterdir()}
    with pytest.raises(FileNotFoundError, match=r"looked for .* config\.json"):
        resolve(tmp_path / "m")
