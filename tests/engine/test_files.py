"""Files that are written aside and renamed."""

import json
from pathlib import Path

import pytest

from narrowgauge.engine.files import replace_folder, write_json, write_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["summary.json"]
    write_json(path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 2}
    assert [found.name for found in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    folder, aside = tmp_path / "step-1", tmp_path / "step-1.tmp"
    for made, text in ((folder, "old"), (aside, "new")):
        made.mkdir()
        write_text(made / "state", text)
    write_text(folder / "left", "over")
    replace_folder(aside, folder)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("state", "new")]
    assert [found.name for found in tmp_path.iterdir()] == ["step-1"]
