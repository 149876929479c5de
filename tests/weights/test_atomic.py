"""A file or folder is there whole or not at all, whatever stops its writer."""

from __future__ import annotations

import errno
import os
import platform
import time

import pytest
import torch

from zoo.errors import DiskFull
from zoo.weights import atomic as room
from zoo.weights import atomic_file, atomic_folder, copy_file


def names(folder):
    return sorted(os.listdir(folder))


def put(path, text):
    """Writes `text` as a file or as a folder's one file, whichever `path` is to be."""
    if path.suffix:
        with atomic_file(path) as partial:
            partial.write_text(text)
    else:
        with atomic_folder(path) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "file").write_text(text)


def held(path):
    return path.read_text() if path.suffix else (path / "inner" / "file").read_text()


@pytest.fixture(params=["settings.json", "step-100"])
def path(request, tmp_path):
    return tmp_path / "run" / request.param


def test_it_appears_when_the_block_ends_and_replaces_the_old(path):
    for text in ("old", "new"):
        put(path, text)
        assert held(path) == text and names(path.parent) == [path.name]


def test_until_then_the_old_one_stands(path):
    put(path, "old")
    with (atomic_file if path.suffix else atomic_folder)(path) as partial:
        partial.write_text("new") if path.suffix else (partial / "file").write_text("new")
        assert held(path) == "old" and partial.parent == path.parent and partial != path


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [True, False])
def test_a_failure_leaves_what_was_there(path, error, old):
    if old:
        put(path, "old")
    with pytest.raises(error), (atomic_file if path.suffix else atomic_folder)(path) as partial:
        partial.write_text("new") if path.suffix else (partial / "file").write_text("new")
        raise error
    assert names(path.parent) == ([path.name] if old else [])
    assert not old or held(path) == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_so_and_tidied(path, number):
    with pytest.raises(DiskFull, match=path.name), (atomic_file if path.suffix else atomic_folder)(path):
        raise OSError(number, os.strerror(number))
    assert names(path.parent) == []


def test_a_full_disk_is_recognised_behind_what_torch_says(path, monkeypatch):
    """torch.save raises a RuntimeError without a number; it is another error where there is room."""
    for free, expected in ((0, DiskFull), (2**40, RuntimeError)):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        with pytest.raises(expected), (atomic_file if path.suffix else atomic_folder)(path):
            raise RuntimeError("PytorchStreamWriter failed writing file")


def test_everything_is_flushed_before_it_is_renamed_and_the_folder_after(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("renamed"), replace(a, b))[1])
    put(path, "text")
    renamed = events.index("renamed")
    before = [event.split(".partial")[-1] for event in events[:renamed]]
    assert sorted(before) == ([""] if path.suffix else ["", "/inner", "/inner/file"])
    assert events[renamed + 1 :] == [str(path.parent)]


def test_what_a_killed_run_left_is_removed_by_the_next(path):
    child = os.fork()
    if child == 0:
        with (atomic_file if path.suffix else atomic_folder)(path) as partial:
            (partial / "file" if partial.is_dir() else partial).write_text("half")
            os._exit(9)
    os.waitpid(child, 0)
    assert len(names(path.parent)) == 1 and not path.exists()
    put(path, "whole")
    assert names(path.parent) == [path.name]


def test_what_another_writer_is_at_work_on_is_left_alone_for_a_day(tmp_path):
    path = tmp_path / "x.json"
    alive = tmp_path / f".x.json.{platform.node()}.{os.getppid()}.partial"
    elsewhere = tmp_path / ".x.json.another-machine.77.partial"
    other = tmp_path / ".xx.json.another-machine.77.partial"
    for partial in (alive, elsewhere, other):
        partial.touch()
    put(path, "text")
    assert alive.exists() and elsewhere.exists() and other.exists()
    yesterday = time.time() - 25 * 3600
    for partial in (alive, elsewhere, other):
        os.utime(partial, (yesterday, yesterday))
    put(path, "text")
    assert names(tmp_path) == [other.name, path.name]


def test_a_folder_that_was_moved_aside_when_the_run_was_killed_comes_back(tmp_path, monkeypatch):
    path = tmp_path / "step-100"
    put(path, "old")
    replace, calls = os.replace, []

    def killed_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed_at_the_second)
        put(path, "new")
    assert not path.exists()
    with pytest.raises(ValueError), atomic_folder(path):
        raise ValueError
    assert held(path) == "old" and names(tmp_path) == ["step-100"]


def test_a_copy_has_the_bytes_and_replaces_what_was_there(tmp_path):
    source, to = tmp_path / "a.txt", tmp_path / "run" / "b.txt"
    for content in (b"first", b"second, longer"):
        source.write_bytes(content)
        assert copy_file(source, to) == to
        assert to.read_bytes() == source.read_bytes() == content and names(to.parent) == ["b.txt"]


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, ""), DiskFull)])
def test_a_copy_that_ends_early_leaves_what_was_there(tmp_path, monkeypatch, error, raised):
    source, to = tmp_path / "a.txt", tmp_path / "run" / "b.txt"
    source.write_bytes(b"old")
    copy_file(source, to)

    def half(_, target):
        target.write_bytes(b"ne")
        raise error

    monkeypatch.setattr(room.shutil, "copyfile", half)
    with pytest.raises(raised):
        copy_file(source, to)
    assert to.read_bytes() == b"old" and names(to.parent) == ["b.txt"]


def test_a_copy_that_several_processes_make_is_never_seen_in_part(tmp_path):
    source, to = tmp_path / "a.bin", tmp_path / "run" / "b.bin"
    content = os.urandom(300_000)
    source.write_bytes(content)
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            try:
                for _ in range(20):
                    copy_file(source, to)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    ended = []
    while children:
        assert not to.exists() or to.read_bytes() == content
        pid, status = os.waitpid(children[0], os.WNOHANG)
        if pid:
            ended.append(status)
            children.pop(0)
    assert ended == [0, 0, 0] and names(to.parent) == ["b.bin"]


def test_torch_can_write_to_it(tmp_path):
    with atomic_file(tmp_path / "x.pt") as partial:
        torch.save({"a": torch.ones(2)}, partial)
    assert torch.load(tmp_path / "x.pt", weights_only=True)["a"].tolist() == [1, 1]
