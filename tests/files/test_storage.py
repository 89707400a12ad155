"""Atomic writes: on success, on errors, on a full disk and after a kill."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from hmdiff.errors import UserError
from hmdiff.files import storage
from hmdiff.files.storage import atomic_file, atomic_folder, make_folder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_appears_whole_under_its_name(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "deep" / "a.npz") as temporary:
        assert temporary.suffix == ".npz"  # writers that check the suffix accept it
        temporary.write_text("new")
        assert not (tmp_path / "deep" / "a.npz").exists()
    assert (tmp_path / "deep" / "a.npz").read_text() == "new"
    assert names(tmp_path / "deep") == ["a.npz"]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / text).write_text(text)
        assert names(tmp_path) == ["model"] and names(tmp_path / "model") == [text]
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


class OtherError(Exception):
    pass


@pytest.mark.parametrize("raised", [OtherError("x"), KeyboardInterrupt(), UserError("mine")])
def test_an_error_leaves_the_old_and_no_litter(tmp_path: Path, raised: BaseException) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_text("old")
    with pytest.raises(type(raised)) as caught, atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise raised
    assert caught.value is raised
    with pytest.raises(type(raised)), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "w").write_text("half")
        raise raised
    assert names(tmp_path) == ["a.txt", "model"]
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "model" / "w").read_text() == "old"


@pytest.mark.parametrize("where", ["block", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "a.txt").write_text("old")
    if where != "block":
        monkeypatch.setattr(os, where, no_space)
    full = pytest.raises(UserError, match=r"a\.txt: no space left on the disk")
    with full, atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        if where == "block":
            no_space()
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """If the folders cannot be swapped atomically, each rename of the fallback may fail."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    monkeypatch.setattr(storage.ctypes, "CDLL", no_space)
    rename, calls = os.rename, iter(range(100))

    def sometimes(source: Path, target: Path) -> None:
        if next(calls) == failing:
            no_space()
        rename(source, target)

    monkeypatch.setattr(os, "rename", sometimes)
    with pytest.raises(UserError, match="no space left"), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "new").touch()
    # After the second rename the new folder is in place; only deleting the old one remains.
    assert names(tmp_path / "model") == (["old"] if failing < 2 else ["new"])
    assert [name for name in names(tmp_path) if name.endswith(".part")] == []


@pytest.mark.parametrize("message", ["I/O error: No space left on device (os error 28)"])
def test_a_writer_with_exceptions_of_its_own_reports_a_full_disk(tmp_path: Path, message: str) -> None:
    """safetensors does not raise OSError."""
    with pytest.raises(UserError, match="no space left on the disk"), atomic_file(tmp_path / "a.safetensors"):
        raise OtherError(message)


FULL_DISK = """
import os, sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file, atomic_folder

disk = Path(sys.argv[1])
big, small = {"w": torch.zeros(300_000)}, {"w": torch.ones(3)}  # 1.2 MB and 12 bytes on a disk of 512 KB


def plain(data, path):
    path.write_bytes(bytes(data["w"].nbytes))


writers = {"torch": torch.save, "safetensors": save_file, "plain": plain}
done = ["folder"]
for name, writer in writers.items():
    with atomic_file(disk / name) as temporary:
        writer(small, temporary)
    with atomic_folder(disk / "folder") as temporary:
        writer(small, temporary / "w")
    before = (disk / name).read_bytes(), (disk / "folder" / "w").read_bytes()
    for context, inner in ((atomic_file(disk / name), ""), (atomic_folder(disk / "folder"), "w")):
        try:
            with context as temporary:
                writer(big, temporary / inner if inner else temporary)
        except UserError as error:
            assert "no space left on the disk" in str(error) and "\\n" not in str(error), error
        else:
            raise AssertionError("the disk was not full")
    assert before == ((disk / name).read_bytes(), (disk / "folder" / "w").read_bytes()), name
    done.append(name)
    assert sorted(os.listdir(disk)) == sorted(done), os.listdir(disk)
print("intact")
"""


@pytest.mark.slow
def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a tmpfs of 512 KB, in a separate mount namespace: torch, safetensors and plain files."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    prepare = f'mount -t tmpfs -o size=512k none "{tmp_path}"'
    if not shutil.which("unshare") or subprocess.run([*mount, prepare], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here; the simulated full disk above covers the logic")
    result = subprocess.run(
        [*mount, f'{prepare} && exec "{sys.executable}" -c "$0" "{tmp_path}"', FULL_DISK],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.strip() == "intact", result.stderr


KILLED = """
import os, signal, sys
from pathlib import Path
from hmdiff.files.storage import atomic_file, atomic_folder

with atomic_file(Path(sys.argv[1]) / "a.txt") as file, atomic_folder(Path(sys.argv[1]) / "model") as folder:
    file.write_text("half")
    (folder / "w").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_old_and_the_next_write_sweeps_up(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    make_folder(tmp_path / "model").joinpath("w").write_text("old")
    mine = [".b.txt.part", ".a.txt.elsewhere-1.part.txt"]  # other names and other machines: must be kept
    for name in mine:
        (tmp_path / name).touch()
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "model" / "w").read_text() == "old"
    assert len(names(tmp_path)) == 6  # two targets, two partial files, two of others
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "w").write_text("new")
    assert names(tmp_path) == sorted(["a.txt", "model", *mine])


def test_a_live_writer_is_not_swept(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.txt") as outer, atomic_folder(tmp_path / "a.txt.d"):
        outer.write_text("outer")
        with atomic_folder(tmp_path / "model") as first:
            with atomic_folder(tmp_path / "model") as second:
                assert first.is_dir() and second.is_dir()


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for attempt in (
        lambda: make_folder(tmp_path / "file"),
        lambda: make_folder(tmp_path / "file" / "below"),
        lambda: atomic_file(tmp_path / "file" / "a.txt").__enter__(),
        lambda: atomic_folder(tmp_path / "file").__enter__(),
    ):
        with pytest.raises(UserError, match="a file of that name is in the way"):
            attempt()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: could not be written"), atomic_file(tmp_path / "folder") as temporary:
        temporary.write_text("x")
    with pytest.raises(UserError, match="may not be written"), atomic_file(tmp_path / "a") as temporary:
        raise PermissionError(errno.EACCES, textwrap.shorten("Permission denied", 20))
    assert names(tmp_path) == ["file", "folder"]


def test_a_symbolic_link_at_a_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(storage.secrets, "token_hex", lambda size: "guessed")
    for suffix in (".txt", ""):
        link = storage._temporary(tmp_path / "a.txt", suffix)
        link.symlink_to(victim)
    for context in (atomic_file(tmp_path / "a.txt"), atomic_folder(tmp_path / "a.txt")):
        with pytest.raises(UserError, match=r"a\.txt: could not be written"), context:
            pytest.fail("entered")
    assert victim.read_text() == "mine"


def test_temporary_names_are_not_guessable(tmp_path: Path) -> None:
    found = set()
    for _ in range(5):
        with atomic_file(tmp_path / "a.txt") as temporary:
            found.add(temporary.name)
    assert len(found) == 5


def test_everything_is_flushed_before_its_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and the folder's entries, then the rename, then the entry of the parent."""
    done: list[str] = []
    monkeypatch.setattr(storage, "sync", lambda path: done.append(path.name if path != tmp_path else "parent"))
    for name in ("replace", "rename"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=original: (done.append("rename"), f(*a)))
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert done == [temporary.name, "rename", "parent"]
    done.clear()
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "w").write_text("x")
    assert done == ["w", "below", temporary.name, "rename", "parent"]


def test_the_umask_decides_the_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a.txt") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # like a writer that makes private files
        with atomic_folder(tmp_path / "model") as temporary:
            os.close(os.open(temporary / "w", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "a.txt", tmp_path / "model", tmp_path / "model" / "w")]
    assert modes == [0o640, 0o750, 0o640]


def test_the_error_is_told_and_not_that_of_the_tidying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that turns read-only: the temporary file cannot be removed either."""

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(UserError, match=r"a\.txt: may not be written \(Read-only"), atomic_file(tmp_path / "a.txt"):
        monkeypatch.setattr(Path, "unlink", read_only)
        read_only()


def test_names_up_to_the_systems_limit(tmp_path: Path) -> None:
    longest = "n" * 251 + ".txt"
    with atomic_file(tmp_path / longest) as temporary:
        temporary.write_text("x")
    with atomic_folder(tmp_path / ("m" * 255)):
        pass
    for context in (atomic_file(tmp_path / ("n" * 256)), atomic_folder(tmp_path / ("n" * 256))):
        with pytest.raises(UserError, match="too long"), context:
            pass
    assert len(names(tmp_path)) == 2
    with pytest.raises(UserError, match="null"):
        make_folder(tmp_path / "a\0b")


def test_a_link_to_a_folder_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    (tmp_path / "model").symlink_to(tmp_path / "target")
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "w").touch()
    assert names(tmp_path / "model") == ["w"] and names(tmp_path / "target") == ["mine"]
    assert names(tmp_path) == ["model", "target"]
