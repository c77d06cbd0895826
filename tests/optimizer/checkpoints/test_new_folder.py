"""A model is there whole or not at all, and nothing stays of one that was never finished, however its writer ended."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optimizer.checkpoints.new_folder import new_folder
from optimizer.errors import MergeError

# `mergefront merge`, whose merge writes half a model and waits, and whose cleaning up waits too
SLOW = """
import shutil, sys, time, types
from pathlib import Path

def merge_recipe(recipe, out):
    from optimizer.checkpoints.new_folder import new_folder
    with new_folder(out) as folder:
        (folder / "model.safetensors").write_text("half")
        print("writing", flush=True)
        time.sleep(60)

def remove(*given, **named):
    print("cleaning", flush=True)
    time.sleep(0.5)
    really_remove(*given, **named)

really_remove, shutil.rmtree = shutil.rmtree, remove
sys.modules["optimizer.export.commands"] = types.SimpleNamespace(merge_recipe=merge_recipe)
from optimizer.cli import main
main()
"""


def slow_merge(out: Path) -> subprocess.Popen[str]:
    """A merge in another process, from when it has written half."""
    command = [sys.executable, "-c", SLOW, "merge", "recipe.json", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    require_line(process, "writing")
    return process


def require_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def test_a_killed_writers_folder_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    killed, living = slow_merge(tmp_path / "killed"), slow_merge(tmp_path / "living")
    killed.kill()
    killed.communicate()
    try:
        mine = [tmp_path / ".own.abcdefgh", tmp_path / ".own.mergefront", tmp_path / "x.abcdefgh.mergefront"]
        for folder in mine:
            folder.mkdir()
        left = {path.name.split(".")[1] for path in tmp_path.glob(".*.????????.mergefront")}
        assert left == {"killed", "living"}
        with new_folder(tmp_path / "out") as folder:
            (folder / "model.safetensors").write_text("whole")
        names = sorted(re.sub(r"\.\w{8}\.mergefront", "", path.name) for path in tmp_path.iterdir() if path not in mine)
        assert names == [".living", "out"]
        assert [path.read_text() for path in tmp_path.glob(".living.*/*")] == ["half"]
        assert all(folder.is_dir() for folder in mine)
    finally:
        living.kill()
        living.communicate()


def test_a_second_ctrl_c_lets_the_first_one_clean_up(tmp_path: Path) -> None:
    process = slow_merge(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    require_line(process, "cleaning")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\0b", "must not hold a NUL character"),
        ("x" * 256, "may have 255 bytes in each name"),
        ("~no_such_user_here/x", "no user of this machine"),
        ("file/x", "cannot be written"),
    ],
)
def test_a_name_no_folder_can_have_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(MergeError, match=message), new_folder(Path(name)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_name_as_long_as_names_can_be_is_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / ("x" * 255)) as folder:
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_a_link_to_nowhere_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MergeError, match="out exists"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_symlink()
