"""Files appear whole and in order, or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_sbn.atomic_files import exclusive, make_folder, partial_path, staged, write_atomically
from megatron_sbn.errors import InputError


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_names_come_at_the_end(tmp_path):
    paths = [tmp_path / "b", tmp_path / "a"]
    with staged(paths):
        for path in paths:
            partial_path(path).write_text(path.name)
        assert _names(tmp_path) == [".a.partial", ".b.partial"]
    assert _names(tmp_path) == ["a", "b"]
    assert [path.read_text() for path in paths] == ["b", "a"]


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, kind):
    path = tmp_path / "there"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path.hardlink_to(tmp_path / "pipe") if kind == "pipe" else path.symlink_to(tmp_path / "pipe")
    before = path.lstat()
    names = _names(tmp_path)
    with pytest.raises(InputError, match="there: is no file that can be written anew; name another"):
        write_atomically(path, b"new")
    assert (path.lstat(), _names(tmp_path)) == (before, names)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, InputError])
def test_failure_leaves_what_was_there(tmp_path, failure):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "never"]
    paths[0].write_text("old")
    (tmp_path / "manifest").write_text("old")

    def fail():
        with staged(paths, obsolete=[tmp_path / "manifest"]):
            partial_path(paths[0]).write_text("new")
            partial_path(paths[1]).write_text("new")
            raise failure

    with pytest.raises(failure):
        fail()
    assert _names(tmp_path) == ["a", "manifest"]
    assert paths[0].read_text() == "old"


def test_cut_between_two_names_takes_the_obsolete_away(tmp_path, monkeypatch):
    """What could vouch for a mixture of two runs is gone before the first file changes its name."""
    paths = [tmp_path / "a.bin", tmp_path / "a.idx"]
    for path in (*paths, tmp_path / "a.json"):
        path.write_text("old")
    rename = Path.replace

    def once(self, target):
        if target == paths[1]:
            raise OSError(5, "Input/output error", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", once)

    def fail():
        with staged(paths, obsolete=[paths[1], tmp_path / "a.json"]):
            for path in paths:
                partial_path(path).write_text("new")

    with pytest.raises(InputError, match=r"a.idx: cannot be written: Input/output error"):
        fail()
    assert _names(tmp_path) == ["a.bin"]


def test_a_partial_file_that_was_not_written(tmp_path):
    with pytest.raises(InputError, match=r"/a: cannot be written: No such file"), staged([tmp_path / "a"]):
        pass
    assert _names(tmp_path) == []


def test_write_whole(tmp_path):
    write_atomically(tmp_path / "a", b"one")
    write_atomically(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert _names(tmp_path) == ["a"]
    with pytest.raises(InputError, match=r"none.*cannot be written: No such file"):
        write_atomically(tmp_path / "none" / "a", b"one")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_paths_that_no_file_can_have(tmp_path, name):
    for fails in (lambda path: write_atomically(path, b""), make_folder, lambda path: exclusive(path).__enter__()):
        with pytest.raises(InputError, match="cannot"):
            fails(tmp_path / name)
    with pytest.raises(InputError, match="has an empty name"):
        exclusive(Path()).__enter__()


def test_folders_are_made_with_those_above_them(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/x"):
        with pytest.raises(InputError, match="cannot be made a folder: .*; name another"):
            make_folder(tmp_path / place)


def test_one_writer_at_a_time(tmp_path):
    prefix = tmp_path / "new" / "folder" / "c"
    with exclusive(prefix):
        with pytest.raises(InputError, match=r"folder/c: another process is writing this output"), exclusive(prefix):
            pass
        with exclusive(prefix.with_name("other")):
            pass
    assert _names(prefix.parent) == []
    with exclusive(prefix):
        pass


def test_writers_of_one_file_at_the_same_time_do_not_fail_each_other(tmp_path):
    """A run and `sbn sync` both keep its tracking.json; threads here, since a partial file is a thread's own."""
    path = tmp_path / "record.json"
    contents = [bytes([letter]) * 5000 for letter in b"abcd"]

    def write(content: bytes) -> None:
        for _ in range(100):
            write_atomically(path, content)

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert path.read_bytes() in contents
    assert _names(tmp_path) == ["record.json"]


@pytest.mark.parametrize("name", [".", "/", "a\0b"])
def test_a_name_that_no_file_has_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match="cannot be written") as error:
        write_atomically(Path(name), b"x")
    assert len(str(error.value).splitlines()) == 1
