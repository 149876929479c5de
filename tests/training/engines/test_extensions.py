"""A killed build is begun again, a living one is waited for."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from zoo.training.engines import extensions
from zoo.training.engines.extensions import wait_for_builds


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    """The lock of a kernel's build, in whose folder nothing has changed for an hour."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return old_lock(tmp_path / "cpu_adam")


def old_lock(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in (folder / "build.ninja", folder / "lock"):
        path.touch()
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - 3600,) * 2)
    return folder / "lock"


def test_where_torch_builds_is_where_locks_are_looked_for(tmp_path, monkeypatch):
    """With TORCH_EXTENSIONS_DIR and without, in torch 2.13."""
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path / "default"))
    for own in (str(tmp_path / "own"), None):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", own) if own else monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        folder = Path(_get_build_directory("cpu_adam", False))
        (folder / "lock").touch()
        assert list(extensions._locks("cpu_adam")) == [folder / "lock"]
        assert list(extensions._locks("async_io")) == []


def test_the_lock_of_a_killed_build_is_removed_with_a_warning(lock, caplog):
    other = old_lock(lock.parents[1] / "async_io")
    wait_for_builds(("cpu_adam", "never_built"))
    assert not lock.exists() and other.exists()
    assert "cpu_adam was killed before its end" in caplog.text and "waiting" not in caplog.text
    assert (lock.parent / "build.ninja").exists()


def test_a_living_builder_is_waited_for_until_it_is_done(lock, caplog):
    with subprocess.Popen(["sh", "-c", "sleep 0.7; rm lock"], cwd=lock.parent) as builder:
        wait_for_builds(("cpu_adam",))
        assert not lock.exists()
        assert builder.wait(30) == 0
    assert f"waiting for another process that builds {lock.parent}" in caplog.text
    assert caplog.text.count("waiting") == 1 and "killed" not in caplog.text


def test_a_builder_that_ends_without_being_done_was_killed(lock, caplog):
    with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as builder:
        threading.Timer(0.7, builder.kill).start()
        wait_for_builds(("cpu_adam",))
        assert builder.wait(30) < 0
    assert not lock.exists() and "cpu_adam was killed before its end" in caplog.text


def test_a_builder_is_seen_through_a_link(lock, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as builder:
        assert extensions._builder(tmp_path / "link" / "cpu_adam")
        builder.kill()
    assert not extensions._builder(lock.parent)


def test_a_build_that_just_began_is_waited_for_until_it_is_stale(lock, caplog, monkeypatch):
    """Between two commands of a build nobody works in its folder."""
    monkeypatch.setattr(extensions, "STALE", 1.0)
    os.utime(lock.parent / "build.ninja")
    start = time.time()
    wait_for_builds(("cpu_adam",))
    assert 1.0 <= time.time() - start < 20
    assert not lock.exists() and "killed before its end" in caplog.text


def test_a_young_lock_that_goes_is_no_killed_build(lock, caplog, monkeypatch):
    os.utime(lock)
    threading.Timer(0.3, lock.unlink).start()
    wait_for_builds(("cpu_adam",))
    assert "killed" not in caplog.text


def test_without_locks_nothing_is_waited_for(tmp_path, monkeypatch, caplog):
    version = sysconfig.get_python_version().replace(".", "")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / f"py{version}_cpu"))
    wait_for_builds(("cpu_adam", "async_io"))
    assert caplog.text == ""
