"""Downloads against a server on this machine that drops, drips, refuses and lies."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests  # noqa: F401  (here, so that no deadline below pays for the import)
from filelock import FileLock

from zoo import hub
from zoo.errors import ChecksumError, DiskFull, DownloadError, OfflineError
from zoo.hub import File, fetch, home, is_here

BODY = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(BODY).hexdigest()
REPOSITORY = Path(hub.__file__).parents[2]


@dataclass
class Page:
    """What the server says at one path."""

    body: bytes = BODY
    status: int = 200
    ranges: bool = True
    conditions: bool = True  # False: as servers that ignore If-Range
    headers: dict = field(default_factory=lambda: {"ETag": '"one"'})
    length: bool = True
    most: int = len(BODY)  # bytes that a range gets at most
    cuts: list[int] = field(default_factory=list)  # the next answers break off after so many bytes
    pause: float = 0.0  # seconds before each byte
    wait: threading.Event | None = None  # the answer starts when it is set, or after half a second


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, dict]] = []
        self.sent = 0
        self.closing = threading.Event()

    def handle_error(self, request, client_address):
        """A client that hangs up is part of these tests."""

    def page(self, path: str, **kwargs) -> str:
        self.pages[path] = Page(**kwargs)
        return f"http://127.0.0.1:{self.server_port}{path}"

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.asked]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        page = self.server.pages.get(self.path, Page(b"nothing here", status=404))
        if page.wait:
            page.wait.wait(0.5)
        start, status = self.start_of(page), page.status
        if start is None:
            status, start = 416, len(page.body)
        elif start:
            status = 206
        stop = min(len(page.body), start + page.most) if status == 206 else len(page.body)
        self.send_response(status)
        if status in (206, 416):
            span = "*" if status == 416 else f"{start}-{stop - 1}"
            self.send_header("Content-Range", f"bytes {span}/{len(page.body)}")
        if page.length:
            self.send_header("Content-Length", str(stop - start))
        for name, value in page.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and status in (200, 206, page.status):
            self.send_body(page, page.body[start:stop])

    def start_of(self, page: Page) -> int | None:
        """The first byte to send; None for a range that is not in the file."""
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        changed = page.conditions and condition not in (None, page.headers.get("ETag"))
        if not wanted or not page.ranges or changed:
            return 0
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        return start if start < len(page.body) else None

    def send_body(self, page: Page, body: bytes):
        body = body[: page.cuts.pop(0)] if page.cuts else body
        for piece in (body[i : i + 1] for i in range(len(body))) if page.pause else [body]:
            if page.pause and self.server.closing.wait(page.pause):
                return
            self.server.sent += len(piece)  # before the client can be done
            self.wfile.write(piece)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "BACKOFF", 0.001)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def names(folder: Path) -> set[str]:
    """What a user sees in the folder."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def interrupt_after(monkeypatch, size: int, act):
    """Calls `act` in the middle of a download, once `size` bytes are on the disk."""
    check = hub._Download.check_deadline

    def check_and_act(self):
        check(self)
        if self.have() >= size:
            monkeypatch.setattr(hub._Download, "check_deadline", check)
            act()

    monkeypatch.setattr(hub._Download, "check_deadline", check_and_act)


# --- what is here ----------------------------------------------------------------------------------------------------
def test_a_packaged_file_is_found_without_network(no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.resources, "files", lambda package: tmp_path)
    (tmp_path / "assets" / "small").mkdir(parents=True)
    (tmp_path / "assets" / "small" / "vocabulary.txt").write_bytes(b"a b c")
    file = File(name="vocabulary.txt", packaged="small/vocabulary.txt", url="http://127.0.0.1:9/never")
    assert is_here(file, tmp_path / "models")
    assert fetch(file, tmp_path / "models").read_bytes() == b"a b c"
    assert not (tmp_path / "models").exists()


def test_a_missing_packaged_file_is_named(tmp_path):
    with pytest.raises(DownloadError, match=r"assets/none/such.bin is missing"):
        fetch(File(name="such.bin", packaged="none/such.bin"), tmp_path)


def test_a_file_laid_there_by_hand_is_hashed_once_and_again_when_it_changed(no_network, tmp_path, monkeypatch):
    file = File(name="weights.pt", repo="zoo/clip", url="http://127.0.0.1:9/never", sha256=SHA256)
    (tmp_path / "weights.pt").write_bytes(BODY)
    assert is_here(file, tmp_path)
    assert fetch(file, tmp_path) == tmp_path / "weights.pt"
    with monkeypatch.context() as patch:
        patch.setattr(hub.hashlib, "sha256", None)
        assert fetch(file, tmp_path) == tmp_path / "weights.pt"
    (tmp_path / "weights.pt").write_bytes(BODY[::-1])
    os.utime(tmp_path / "weights.pt", ns=(1, 1))
    with pytest.raises(ChecksumError, match=SHA256):
        fetch(file, tmp_path)
    assert (tmp_path / "weights.pt").read_bytes() == BODY[::-1], "the user's file is the user's"


def test_a_download_is_not_hashed_or_asked_for_again(server, tmp_path, monkeypatch):
    file = File(name="sub/weights.pt", url=server.page("/w"), sha256=SHA256)
    assert not is_here(file, tmp_path)
    path = fetch(file, tmp_path)
    assert path == tmp_path / "sub" / "weights.pt" and path.read_bytes() == BODY
    assert names(path.parent) == {"weights.pt"} and not list(tmp_path.rglob("*.source"))
    monkeypatch.setattr(hub.hashlib, "sha256", None)
    assert fetch(file, tmp_path) == path and is_here(file, tmp_path)
    assert len(server.asked) == 1


def test_offline_a_file_that_is_here_is_used_and_one_that_is_not_is_named(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here.pt").write_bytes(BODY)
    assert fetch(File(name="here.pt", repo="zoo/clip", sha256=SHA256), tmp_path) == tmp_path / "here.pt"
    for source in ({"repo": "zoo/clip"}, {"url": "http://127.0.0.1:9/w"}, {"mirrors": ("http://127.0.0.1:9/w",)}):
        with pytest.raises(OfflineError) as error:
            fetch(File(name="gone.pt", **source), tmp_path / "models")
        assert str(tmp_path / "models" / "gone.pt") in str(error.value) and "HF_HUB_OFFLINE" in str(error.value)
    assert not (tmp_path / "models").exists()


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "chosen"))
    assert home() == tmp_path / "chosen" and not home().exists()
    monkeypatch.delenv("ZOO_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "zoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "zoo"


def test_the_default_folder_is_home(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "home"))
    assert fetch(File(name="w", url=server.page("/w"))) == tmp_path / "home" / "w"


@pytest.mark.parametrize("name", ["/etc/w", "../w", "a/../../w", ""])
def test_a_name_cannot_leave_the_folder(name, tmp_path):
    with pytest.raises(DownloadError, match="not the name of a file"):
        fetch(File(name=name, url="http://127.0.0.1:9/w"), tmp_path)


@pytest.mark.parametrize("source", [{}, {"url": "ftp://127.0.0.1/w"}, {"url": "no scheme"}])
def test_a_file_without_a_usable_source_is_an_error_with_a_remedy(source, server, tmp_path):
    with pytest.raises(DownloadError, match="weights="):
        fetch(File(name="w.pt", **source), tmp_path)


# --- resuming --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sha256", [SHA256, None])
def test_after_dropped_connections_only_the_rest_is_fetched(sha256, server, tmp_path):
    url = server.page("/w", cuts=[200_000, 100_000])
    assert fetch(File(name="w", url=url, sha256=sha256), tmp_path).read_bytes() == BODY
    assert server.ranges() == [None, "bytes=200000-", "bytes=300000-"]
    assert server.sent == len(BODY)


def test_a_server_that_sends_less_than_it_was_asked_for_is_asked_again(server, tmp_path):
    url = server.page("/w", cuts=[200_000], most=200_000)
    assert fetch(File(name="w", url=url), tmp_path).read_bytes() == BODY
    assert server.ranges() == [None, "bytes=200000-", "bytes=400000-"]


def test_as_long_as_much_comes_a_source_is_not_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PROGRESS", 50_000)
    url = server.page("/w", cuts=[60_000] * (2 * hub.TRIES))
    assert fetch(File(name="w", url=url), tmp_path).read_bytes() == BODY
    assert len(server.asked) == 2 * hub.TRIES + 1 and server.sent == len(BODY)


def test_a_server_without_ranges_is_asked_for_the_whole_again(server, tmp_path):
    url = server.page("/w", cuts=[200_000], ranges=False)
    assert fetch(File(name="w", url=url), tmp_path).read_bytes() == BODY
    assert server.sent == len(BODY) + 200_000


def test_without_sha256_or_etag_nothing_is_joined(server, tmp_path):
    url = server.page("/w", cuts=[200_000], headers={})
    assert fetch(File(name="w", url=url), tmp_path).read_bytes() == BODY
    assert server.ranges() == [None, None]


def test_ctrl_c_leaves_a_part_that_the_next_call_resumes(server, tmp_path, monkeypatch):
    file = File(name="w", url=server.page("/w", cuts=[200_000]))

    def press():
        raise KeyboardInterrupt

    interrupt_after(monkeypatch, 1, press)
    with pytest.raises(KeyboardInterrupt):
        fetch(file, tmp_path)
    assert names(tmp_path) == {"w.part"} and not is_here(file, tmp_path)
    had = (tmp_path / "w.part").stat().st_size
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={had}-"] and names(tmp_path) == {"w"}


def test_a_killed_process_leaves_only_a_part_and_no_lock(server, tmp_path):
    url = server.page("/w", cuts=[200_000])
    script = f"""
import os, signal
from zoo import hub
def check(self):
    if self.have() >= 100_000:
        os.kill(os.getpid(), signal.SIGKILL)
hub._Download.check_deadline = check
hub.fetch(hub.File(name="w", url={url!r}, sha256={SHA256!r}), {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == -signal.SIGKILL
    assert names(tmp_path) == {"w.part"}
    file = File(name="w", url=url, sha256=SHA256)
    assert fetch(file, tmp_path, deadline=60).read_bytes() == BODY
    assert int(server.ranges()[-1].strip("bytes=-")) >= 100_000


@pytest.mark.parametrize("conditions", [True, False])
def test_a_file_that_changed_between_two_calls_is_fetched_whole(conditions, server, tmp_path):
    file = File(name="w", url=server.page("/w", cuts=[200_000] + [0] * 9))
    with pytest.raises(DownloadError):
        fetch(file, tmp_path)
    server.page("/w", body=BODY[::-1], headers={"ETag": '"two"'}, conditions=conditions)
    asked = len(server.asked)
    assert fetch(file, tmp_path).read_bytes() == BODY[::-1]
    assert server.asked[asked][1]["If-Range"] == '"one"'


@pytest.mark.parametrize(
    "part", [BODY, BODY[::-1], BODY[::-1][:1000], BODY * 2], ids="whole other begun longer".split()
)
def test_whatever_part_is_found_the_published_bytes_come_out(part, server, tmp_path):
    (tmp_path / "w.part").write_bytes(part)
    assert fetch(File(name="w", url=server.page("/w"), sha256=SHA256), tmp_path).read_bytes() == BODY
    assert server.sent == (0 if part == BODY else 2 * len(BODY) - 1000 if len(part) == 1000 else len(BODY))


# --- wrong bytes -----------------------------------------------------------------------------------------------------
def test_an_altered_file_is_refused_by_both_hashes_and_removed(server, tmp_path):
    url = server.page("/w", body=BODY[::-1])
    with pytest.raises(ChecksumError) as error:
        fetch(File(name="w", url=url, sha256=SHA256), tmp_path)
    assert SHA256 in str(error.value) and hashlib.sha256(BODY[::-1]).hexdigest() in str(error.value)
    assert names(tmp_path) == set()


def test_after_an_altered_file_the_mirror_is_tried(server, tmp_path):
    url, mirror = server.page("/bad", body=BODY[::-1]), server.page("/good")
    assert fetch(File(name="w", url=url, mirrors=(mirror,), sha256=SHA256), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("length", [True, False])
def test_an_answer_that_always_ends_early_is_no_file(length, server, tmp_path):
    headers = {} if length else {"Transfer-Encoding": "chunked"}  # whose last chunk never comes
    body = BODY if length else b"5\r\nhello\r\n"
    url = server.page("/w", body=body, headers=headers, length=length, cuts=[1000] * 9, ranges=False)
    with pytest.raises(DownloadError, match="4 tries"):
        fetch(File(name="w", url=url), tmp_path)
    assert names(tmp_path) == {"w.part"} and len(server.asked) == hub.TRIES


@pytest.mark.parametrize("page", [{"headers": {"Content-Type": "text/html; charset=utf-8"}}, {"body": BODY[:99]}])
def test_a_page_in_place_of_a_file_without_sha256_is_refused(page, server, tmp_path):
    with pytest.raises(DownloadError, match="not with the file"):
        fetch(File(name="w", url=server.page("/w", **page), size=len(BODY)), tmp_path)
    assert names(tmp_path) == set()


# --- servers that refuse, and that keep one waiting ------------------------------------------------------------------
@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_told_with_url_status_and_remedy_at_once(status, server, tmp_path):
    url = server.page("/w", status=status)
    with pytest.raises(DownloadError) as error:
        fetch(File(name="w", url=url), tmp_path)
    assert all(word in str(error.value) for word in (url, str(status), "weights=", str(tmp_path / "w")))
    assert len(server.asked) == 1 and names(tmp_path) == set()


def test_sources_are_tried_in_order_and_each_failure_is_told(server, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/w"
    missing, busy = server.page("/missing", status=404), server.page("/busy", status=503)
    with pytest.raises(DownloadError) as error:
        fetch(File(name="w", url=dead, mirrors=(missing, busy)), tmp_path)
    message = str(error.value)
    assert message.index(dead) < message.index(missing) < message.index(busy)
    assert [path for path, _ in server.asked] == ["/missing"] + ["/busy"] * hub.TRIES
    assert fetch(File(name="w", url=dead, mirrors=(server.page("/w"),)), tmp_path).read_bytes() == BODY


@pytest.mark.skipif(sys.platform != "linux", reason="a full queue of connections is ignored on Linux only")
def test_a_host_that_cannot_be_reached_is_tried_once(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hub, "CONNECT", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        url = f"http://127.0.0.1:{full.getsockname()[1]}/w"
        assert fetch(File(name="w", url=url, mirrors=(server.page("/w"),)), tmp_path).read_bytes() == BODY
    assert [record.getMessage() for record in caplog.records] == [f"{url}: no connection within 0.1 s."]


def test_a_slow_drip_ends_at_the_deadline_and_keeps_what_came(server, tmp_path):
    file = File(name="w", url=server.page("/w", body=BODY[:100], pause=0.05), mirrors=(server.page("/never"),))
    with pytest.raises(DownloadError, match="^w: the deadline has passed"):
        fetch(file, tmp_path, deadline=0.5)
    assert names(tmp_path) == {"w.part"} and len(server.asked) == 1
    assert 0 < (tmp_path / "w.part").stat().st_size < 100


def test_a_silent_server_ends_at_the_deadline(tmp_path, server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/w"
        with pytest.raises(DownloadError, match="deadline"):
            fetch(File(name="w", url=url), tmp_path, deadline=0.2)


def test_without_deadline_a_drip_is_given_up_too(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "STALL", (0.05, 1000))
    with pytest.raises(DownloadError, match="4 tries"):
        fetch(File(name="w", url=server.page("/w", body=BODY[:200], pause=0.02)), tmp_path)


# --- disk and processes ----------------------------------------------------------------------------------------------
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_with_size_and_folder_and_nothing_is_left(server, tmp_path):
    (tmp_path / "w.part").symlink_to("/dev/full")
    with pytest.raises(DiskFull) as error:
        fetch(File(name="w", url=server.page("/w")), tmp_path)
    assert f"{len(BODY):,} bytes are needed" in str(error.value) and str(tmp_path) in str(error.value)
    assert names(tmp_path) == set() and not any(path.is_symlink() for path in tmp_path.iterdir())


def test_a_file_larger_than_the_disk_is_not_begun(server, tmp_path, monkeypatch):
    usage = hub.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=len(BODY) - 1))
    interrupt_after(monkeypatch, 1, lambda: pytest.fail("bytes were written"))
    with pytest.raises(DiskFull, match=f"{len(BODY):,} bytes are needed, {len(BODY) - 1:,} free"):
        fetch(File(name="w", url=server.page("/w"), sha256=SHA256), tmp_path)
    assert names(tmp_path) == set()


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "models").write_text("a file where a folder should be")
    with pytest.raises(DownloadError, match="cannot write .*models.*ZOO_HOME"):
        fetch(File(name="w", url=server.page("/w")), tmp_path / "models")
    assert server.asked == []


def test_two_processes_download_once(server, tmp_path):
    url = server.page("/w", wait=threading.Event())  # set by nobody: time for the second process to ask
    script = (
        "import sys, filelock, requests; from zoo import hub; print(flush=True); sys.stdin.readline();"
        f"hub.fetch(hub.File(name='w', url={url!r}, sha256={SHA256!r}), {str(tmp_path)!r})"
    )
    command = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0]
    assert len(server.asked) == 1 and (tmp_path / "w").read_bytes() == BODY


def test_waiting_for_another_process_ends_at_the_deadline(server, tmp_path):
    (tmp_path / ".zoo").mkdir()
    with FileLock(tmp_path / ".zoo" / "w.lock"), pytest.raises(DownloadError, match="another process"):
        fetch(File(name="w", url=server.page("/w")), tmp_path, deadline=0.1)
    assert server.asked == []


def test_import_loads_no_torch_and_no_http_library():
    script = "import sys, zoo.hub; print(sorted({'torch', 'requests', 'huggingface_hub', 'tqdm'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


# --- hub ids ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub_server(server, monkeypatch):
    """A server that answers as the hub does for `zoo/clip`: what it stores lies behind a redirect, on another host."""
    store = Server()
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    linked = {"X-Repo-Commit": "c" * 40, "X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": str(len(BODY))}
    location = store.page(f"/store/{SHA256}", headers={"ETag": f'"{SHA256}"'}, cuts=[200_000])
    for revision in ("main", "refs%2Fpr%2F8"):
        path = f"/zoo/clip/resolve/{revision}/deep/model.safetensors"
        server.page(path, body=b"", status=302, headers={"Location": location, **linked})
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    server.store = store
    yield server
    store.shutdown()
    thread.join()
    store.server_close()


FILE = File(name="model.safetensors", repo="zoo/clip", path="deep/model.safetensors", sha256=SHA256)


def test_a_hub_id_is_resumed_verified_and_leaves_nothing_else(hub_server, tmp_path):
    path = fetch(FILE, tmp_path)
    assert path == tmp_path / "model.safetensors" and path.read_bytes() == BODY
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", ".zoo"}
    assert hub_server.store.sent == len(BODY) and hub_server.store.ranges() == [None, "bytes=200000-"]


def test_the_second_call_for_a_hub_id_asks_nobody(hub_server, tmp_path, request):
    fetch(FILE, tmp_path)
    request.getfixturevalue("no_network")
    assert fetch(FILE, tmp_path).read_bytes() == BODY


def test_a_hub_revision_and_the_hubs_own_downloader_agree_with_ours(hub_server, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    theirs = huggingface_hub.hf_hub_download(
        FILE.repo,
        FILE.path,
        revision="refs/pr/8",
        local_dir=tmp_path / "theirs",
        endpoint=os.environ["HF_ENDPOINT"][:-1],
    )
    ours = fetch(File(name="w", repo=FILE.repo, path=FILE.path, revision="refs/pr/8"), tmp_path / "ours")
    assert ours.read_bytes() == Path(theirs).read_bytes() == BODY
    assert hub_server.asked[-1][0] == f"/zoo/clip/resolve/refs%2Fpr%2F8/{FILE.path}"


def test_the_users_token_goes_to_the_hub_only(hub_server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(FILE, tmp_path)
    assert hub_server.asked[0][1]["authorization"] == "Bearer hf_secret"
    assert not any("hf_secret" in str(headers) for _, headers in hub_server.store.asked)


def test_the_token_is_not_sent_to_urls_and_mirrors(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", server.page(""))
    fetch(File(name="w", url=server.page("/gone", status=404), mirrors=(server.page("/w"),), repo="zoo/clip"), tmp_path)
    assert not any("hf_secret" in str(headers) for _, headers in server.asked)


def test_a_gated_hub_id_says_what_to_do(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.page("").rstrip("/"))
    server.page("/zoo/clip/resolve/main/w", status=401)
    with pytest.raises(DownloadError, match="accept its terms and log in"):
        fetch(File(name="w", repo="zoo/clip"), tmp_path)
