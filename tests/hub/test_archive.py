from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile

import pytest

from zoo import hub
from zoo.errors import ChecksumError, DiskFull, DownloadError
from zoo.hub.archive import extract

BODY = bytes(range(256)) * 2000


def tar(path, mode: str = "w:gz", prefix: str = "./top/"):
    with tarfile.open(path, mode) as archive:
        link = tarfile.TarInfo(f"{prefix}link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
        for name, body in (("a", b"first"), ("b/c", BODY), ("../out", b"outside")):
            info = tarfile.TarInfo(prefix + name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def zipped(path, *names: str):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, b"" if name.endswith("/") else BODY)
    return path


def test_a_zip_gives_its_files_too(tmp_path):
    archive = zipped(tmp_path / "x.zip", "top/", "top/b/c")
    extract(archive, "top/b/c", tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == BODY
    with pytest.raises(DownloadError, match="holds no file top, but top/, top/b/c"):
        extract(archive, "top", tmp_path / "v")
    whole = archive.read_bytes()
    for data in (whole[:-30], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        archive.write_bytes(data)
        with pytest.raises(DownloadError, match="Remove it to download it again"):
            extract(archive, "top/b/c", tmp_path / "v")


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    """Such as one of a torch checkpoint."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(zipped(tmp_path / "x.zip", "a"), "model.ckpt")
    extract(tmp_path / "x.tar", "model.ckpt", tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == (tmp_path / "x.zip").read_bytes()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("prefix", ["./top/", "top/"])
def test_one_member_is_written_and_nothing_else(mode, prefix, tmp_path):
    archive = tar(tmp_path / "x.tar.gz", mode, prefix)
    (tmp_path / "out").mkdir()
    extract(archive, "top/b/c", tmp_path / "out" / "w")
    assert (tmp_path / "out" / "w").read_bytes() == BODY
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "w", "x.tar.gz"]


@pytest.mark.parametrize("member", ["top/d", "top/link", "top/b", "out"])
def test_what_is_no_file_of_the_archive_is_named(member, tmp_path):
    archive = tar(tmp_path / "x.tar.gz")
    with pytest.raises(DownloadError, match=f"holds no file {member}, but ./top/link, ./top/a, ./top/b/c"):
        extract(archive, member, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"<html>" + data])
def test_a_damaged_archive_says_what_to_do(mode, damage, tmp_path):
    archive = tar(tmp_path / "x.tar.gz", mode)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(DownloadError, match="Remove it to download it again"):
        extract(archive, "top/b/c", tmp_path / "w")


def test_a_file_of_an_archive_is_fetched_verified_and_kept(tmp_path):
    whole = hub.File(name="x.tar.gz")
    tar(tmp_path / whole.name)
    file = hub.File(name="b/w", archive=whole, path="top/b/c", sha256=hashlib.sha256(BODY).hexdigest())
    assert hub.fetch(file, tmp_path).read_bytes() == BODY
    (tmp_path / whole.name).unlink()  # not asked for again
    assert hub.fetch(file, tmp_path) == tmp_path / "b/w"


def test_altered_bytes_do_not_get_the_files_name(tmp_path):
    tar(tmp_path / "x.tar.gz")
    file = hub.File(name="w", archive=hub.File(name="x.tar.gz"), path="top/b/c", sha256="0" * 64)
    with pytest.raises(ChecksumError, match="It came from .*x.tar.gz and was removed"):
        hub.fetch(file, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.tar.gz"]


def test_an_archive_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(DownloadError, match="x.tar.gz is not in .*, and has no source"):
        hub.fetch(hub.File(name="w", archive=hub.File(name="x.tar.gz"), path="top/a"), tmp_path)


def test_a_member_larger_than_the_disk_is_not_begun(tmp_path, monkeypatch):
    usage = hub.shutil.disk_usage(tmp_path)
    tar(tmp_path / "x.tar.gz")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=len(BODY) - 1))
    with pytest.raises(DiskFull):
        hub.fetch(hub.File(name="w", archive=hub.File(name="x.tar.gz"), path="top/b/c"), tmp_path)
    assert not (tmp_path / "w").exists() and not (tmp_path / "w.part").exists()
