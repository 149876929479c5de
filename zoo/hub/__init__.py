"""A file that a card names -> a path on this machine that holds the published bytes.

Looked for among the packaged assets, in the folder, then at its url, mirrors and hub id, or in its archive. Only
verified bytes get the final name: they arrive in `<name>.part`, which an interrupted download leaves to be resumed, and
are synced, hashed, renamed. Notes lie in `.zoo/` beside: `<name>.sha256` (verified), `<name>.source` (of a part), lock.
Read from the environment: ZOO_HOME, XDG_CACHE_HOME, HF_ENDPOINT, and HF_HUB_OFFLINE, which forbids direct urls too.

huggingface_hub gives a hub id its address and the user's token; the bytes come through this file, as its own downloader
(2.4.0) throws away what an interrupted download brought, knows no deadline, and leaves a `.cache` in the folder.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path, PurePath

from zoo.errors import ChecksumError, DiskFull, DownloadError, OfflineError
from zoo.hub.archive import extract
from zoo.hub.file import File

CHUNK = 1 << 20  # bytes read at most at a time
TRIES, PROGRESS = 4, 1 << 20  # a source is given up after so many failures in a row with fewer new bytes than that
BACKOFF = 0.5  # seconds before the second try, doubled for each one after
CONNECT, SILENCE = 10.0, 20.0  # seconds to reach a server, and without a byte, after which a connection has failed
STALL = 60.0, 64 << 10  # so has one that brings fewer than these bytes in these seconds

log = logging.getLogger(__name__)


def home() -> Path:
    """Where downloads live: $ZOO_HOME, or `zoo` in the user's cache folder. Makes nothing."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("ZOO_HOME") or Path(cache) / "zoo").expanduser()


def is_here(file: File, folder: Path | None = None) -> bool:
    """Whether the package or `folder` (None: `home()`) has the file. Reads no byte of it."""
    return _packaged(file) is not None or _target(file, folder).is_file()


def fetch(file: File, folder: Path | None = None, *, deadline: float | None = None) -> Path:
    """The verified path of `file`, downloaded into `folder` (None: `home()`) unless it is here.

    `deadline` bounds the seconds of all sources and tries together, to which a silent server can add SILENCE; without
    one, a download that stalls still ends after TRIES. A file laid into `folder` by hand is hashed when first asked for
    and again when it has changed; a packaged one, installed with the code, is not.

    Raises OfflineError (not here, and HF_HUB_OFFLINE is set), ChecksumError (not the published bytes), DiskFull, and
    DownloadError for the rest: no source, a refusal, a passed deadline, a folder that cannot be written.
    """
    if packaged := _packaged(file):
        return packaged
    target = _target(file, folder)
    download = _Download(file, target, deadline)
    if not target.is_file():
        archive = fetch(file.archive, folder, deadline=deadline) if file.archive else None
        if not archive:
            download.require_network()
        with download.alone():
            if not target.is_file():  # unless another process brought it while this one waited
                return download.unpack(archive) if archive else download.run()
    download.verify(target, "Remove it to download it again, or pass weights= with its path to use it as it is.")
    return target


def _packaged(file: File) -> Path | None:
    path = Path(str(resources.files("zoo").joinpath("assets", file.packaged or "")))
    return path if path.is_file() else None


def _target(file: File, folder: Path | None) -> Path:
    name = PurePath(file.name)
    if not name.name or name.is_absolute() or ".." in name.parts:
        raise DownloadError(f"{file.name!r} is not the name of a file below a folder.")
    return (home() if folder is None else Path(folder).expanduser()) / name


def _read(note: Path) -> str:
    return note.read_text(errors="replace") if note.is_file() else ""


class _Download:
    """One file on its way here: source after source, try after try."""

    def __init__(self, file: File, target: Path, deadline: float | None) -> None:
        self.file, self.target, self.part = file, target, target.with_name(target.name + ".part")
        note = target.parent / ".zoo" / target.name
        self.verified, self.source, self.locked = (Path(f"{note}.{kind}") for kind in ("sha256", "source", "lock"))
        self.total = file.size  # until a server says it exactly
        self.end = float("inf") if deadline is None else time.monotonic() + deadline
        self.by_hand = f"Put it at {target} by hand, or pass weights= with a local copy."

    def verify(self, path: Path, remedy: str) -> None:
        """Hashes the file, unless it was found to be the published one and has not changed since."""
        published = self.file.sha256
        seal = f"{published} {path.stat().st_size} {path.stat().st_mtime_ns}"
        if published is None or _read(self.verified) == seal:
            return
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(CHUNK):
                digest.update(block)
        if digest.hexdigest() != published.lower():
            raise ChecksumError(f"{path} has sha256 {digest.hexdigest()}, not the published {published}. {remedy}")
        with suppress(OSError):  # a read-only or full disk costs a hash at each use, nothing else
            self.verified.parent.mkdir(exist_ok=True)
            self.verified.write_text(seal)

    def have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def remove_part(self) -> None:
        self.part.unlink(missing_ok=True)
        self.source.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Makes the folders, holds the file's lock, and turns what the disk may answer into errors of ours."""
        from filelock import FileLock, Timeout

        try:
            self.locked.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.locked, timeout=max(0.0, self.left())):  # that of a killed process is free
                yield
        except Timeout as error:
            raise DownloadError(f"another process still downloads {self.target}; call again later.") from error
        except OSError as error:
            remedy = "choose another folder with model_dir= or ZOO_HOME."
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise DownloadError(f"cannot write {self.target}: {error}; {remedy}") from error
            self.remove_part()
            free = shutil.disk_usage(next(p for p in self.target.parents if p.exists())).free
            need = f"{self.total:,} bytes are needed, {free:,} free" if self.total else f"{free:,} bytes are free"
            raise DiskFull(f"no room for {self.target}: {need}; make room there, or {remedy}") from error

    def require_network(self) -> None:
        addresses = [a for a in (self.file.url, *self.file.mirrors, self.file.repo) if a]
        if not addresses:
            lack = f"assets/{self.file.packaged} is missing from zoo" if self.file.packaged else "has no source"
            raise DownloadError(f"{self.file.name} is not in {self.target.parent}, and {lack}. {self.by_hand}")
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            where = f"is not in {self.target.parent}, and HF_HUB_OFFLINE forbids to ask {', '.join(addresses)}"
            raise OfflineError(f"{self.target.name} {where}. {self.by_hand}")

    def sources(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Address and headers of each, in order."""
        yield from ((url, {}) for url in (self.file.url, *self.file.mirrors) if url)
        if self.file.repo:
            from huggingface_hub import hf_hub_url
            from huggingface_hub.utils import build_hf_headers

            # Read here, because huggingface_hub reads it only once, when imported.
            endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
            path = self.file.path or self.file.name
            yield hf_hub_url(self.file.repo, path, revision=self.file.revision, endpoint=endpoint), build_hf_headers()

    def run(self) -> Path:
        """Tries the sources in order until one gives the published bytes."""
        failures: list[DownloadError] = []
        for url, headers in self.sources():
            try:
                return self.obtain(url, headers)
            except DownloadError as error:
                self.check_deadline()
                log.warning("%s", error)
                failures.append(error)
        kind = ChecksumError if any(isinstance(f, ChecksumError) for f in failures) else DownloadError
        reasons = "\n".join(f"  {failure}" for failure in failures)
        raise kind(f"{self.file.name} could not be fetched:\n{reasons}\n{self.by_hand}") from failures[-1]

    def obtain(self, url: str, headers: dict[str, str]) -> Path:
        """One source -> the file under its final name."""
        resumed = self.have() > 0
        self.transfer(url, headers)
        try:
            return self.settle(url)
        except ChecksumError:
            if not resumed:
                raise
            return self.obtain(url, headers)  # its beginning was of another run or source: once more, whole

    def unpack(self, archive: Path) -> Path:
        """The archive that holds it -> the file under its final name. The archive stays."""
        extract(archive, self.file.path or self.file.name, self.part)
        return self.settle(str(archive))

    def settle(self, origin: str) -> Path:
        """The part, if it is the published file, under its final name; else it is removed."""
        with self.part.open("rb+") as stream:
            os.fsync(stream.fileno())
        try:
            self.verify(self.part, f"It came from {origin} and was removed.")
        except ChecksumError:
            self.remove_part()
            raise
        os.replace(self.part, self.target)
        self.source.unlink(missing_ok=True)
        return self.target

    def transfer(self, url: str, headers: dict[str, str]) -> None:
        """As many connections as it takes; bounded, for only real progress earns new tries."""
        tries, most = 0, self.have()
        while True:
            try:
                return self.attempt(url, headers)
            except ConnectionError as drop:
                tries = 1 if self.have() >= most + PROGRESS else tries + 1
                most = max(most, self.have())
                if tries == TRIES:
                    raise DownloadError(f"{url}: {drop} ({TRIES} tries).") from drop
                self.check_deadline()
                time.sleep(max(0.0, min(BACKOFF * 2 ** (tries - 1), self.left())))

    def left(self) -> float:
        return self.end - time.monotonic()

    def check_deadline(self) -> None:
        if self.left() <= 0:
            raise DownloadError(f"{self.file.name}: the deadline has passed; call again to go on from {self.part}.")

    def attempt(self, url: str, headers: dict[str, str]) -> None:
        """Asks for what the part lacks and appends it. Raises ConnectionError where another try may help."""
        import requests
        import urllib3

        self.check_deadline()
        headers = {"Accept-Encoding": "identity", **headers}
        source, _, validator = _read(self.source).partition("\n")
        condition = {"If-Range": validator} if validator and source == url else {}
        if self.have() and (condition or self.file.sha256):  # else two files could be joined unnoticed
            headers |= {"Range": f"bytes={self.have()}-", **condition}
        timeout = min(CONNECT, self.left()), min(SILENCE, self.left())
        try:
            with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
                self.receive(url, response)
        except requests.ConnectTimeout as error:  # slow to find out and unlikely to mend: the next source
            raise DownloadError(f"{url}: no connection within {timeout[0]:g} s.") from error
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise ConnectionError("the connection failed: " + str(error).rpartition(": ")[2].rstrip(")\"'")) from error
        except requests.RequestException as error:
            raise DownloadError(f"{url}: {error}") from error

    def receive(self, url: str, response) -> None:
        """Judges the answer by its status and headers, and appends its body to the part."""
        status, given = response.status_code, response.headers
        span, _, whole = given.get("Content-Range", "").partition("/")
        whole = given.get("Content-Length", "") if status == 200 else whole
        if status == 416 and whole == str(self.have()):
            return  # the part was whole already
        etag = given.get("ETag", "W/")  # a weak one is no condition for a range
        source = f"{url}\n{given.get('Last-Modified', '') if etag.startswith('W/') else etag}"
        same = self.file.sha256 or source == _read(self.source)  # there are servers that ignore If-Range
        if status == 416 or (status == 206 and not (same and span.startswith(f"bytes {self.have()}-"))):
            self.remove_part()
            raise ConnectionError("the server has another file than before")
        if status in (408, 429) or status >= 500:
            raise ConnectionError(f"status {status}")
        if status not in (200, 206):
            gated = " If the repository asks for it, accept its terms and log in to the hub." * (status in (401, 403))
            raise DownloadError(f"{url} answered with status {status}.{gated}")
        size = int(whole) if whole.isdigit() else None
        near = size is None or not self.file.size or 0.5 < size / self.file.size < 2
        if self.file.sha256 is None and (not near or given.get("Content-Type", "").startswith("text/html")):
            raise DownloadError(f"{url} answered with {given.get('Content-Type')} of {size} bytes, not with the file.")
        if status == 200:
            self.part.write_bytes(b"")
            self.source.write_text(source)
        self.total = size or self.file.size
        if (self.total or 0) - self.have() > shutil.disk_usage(self.part.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.pump(response, size)
        if size and self.have() < size:
            raise ConnectionError(f"only {self.have():,} of {size:,} bytes came")

    def pump(self, response, size: int | None) -> None:
        from tqdm import tqdm

        every = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file needs few lines
        have = self.have()
        bar = tqdm(None, self.file.name, size, unit="B", unit_scale=True, initial=have, delay=1.0, mininterval=every)
        since, fresh = time.monotonic(), 0
        with self.part.open("ab") as out, bar:
            while chunk := response.raw.read1(CHUNK, decode_content=False):  # read would wait for a full CHUNK
                out.write(chunk)
                bar.update(len(chunk))
                self.check_deadline()
                fresh += len(chunk)
                if time.monotonic() - since > STALL[0]:
                    if fresh < STALL[1]:
                        raise ConnectionError(f"{fresh:,} bytes in {STALL[0]:g} s")
                    since, fresh = time.monotonic(), 0
