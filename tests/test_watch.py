"""`zoo watch`: a log as it is written, cut, half-written or damaged; what is said of it, and how one leaves."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from zoo.cli import main
from zoo.commands import watch
from zoo.commands.run_log import RunLog, duration
from zoo.commands.run_view import view
from zoo.commands.tables import width
from zoo.errors import SettingsError

ROOT = Path(__file__).parent.parent


def line(step: int, **more) -> dict:
    return {"step": step, "epoch": 0, "loss": 4 - step / 100, "lr": 1e-3, "seconds": step * 2.0, **more}


def write(folder: Path, lines: list[dict], total: int = 100, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"total_steps": total, "env_type": "pytorch", **settings}))
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run half-way, a line at every tenth step."""
    return write(tmp_path / "clip", [line(step) for step in range(10, 51, 10)])


def add(folder: Path, text: str) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(text)


def losses(log: RunLog) -> dict[float, float]:
    return dict(zip(*log.fields["loss"], strict=True))


# --- reading ---------------------------------------------------------------------------------------------------------
def test_reading_on_is_reading_at_once(folder: Path):
    text = "".join(json.dumps(line(step, eval={"loss": 1.0 * step})) + "\n" for step in range(60, 101, 10))
    log = RunLog(folder)
    for start in range(0, len(text), 37):  # pieces that end within lines
        add(folder, text[start : start + 37])
        log.read()
    whole = RunLog(folder)
    assert losses(log) == losses(whole) and log.line == whole.line and log.step == 100
    assert log.fields["eval/loss"] == whole.fields["eval/loss"] and not log.events and not log.unread


def test_a_half_written_line_counts_when_it_is_whole(folder: Path):
    log = RunLog(folder)
    add(folder, '{"step": 60, "loss": 1')
    log.read()
    assert log.step == 50
    add(folder, ".5}\n")
    log.read()
    assert log.step == 60 and losses(log)[60] == 1.5


@pytest.mark.parametrize(
    "broken",
    ["\n", "nonsense\n", "[1]\n", '{"loss": 1}\n', '{"step": null}\n', '{"step": true}\n', "\x00\x00\n", "1\n"],
)
def test_a_line_that_is_none_is_counted_and_left_out(folder: Path, broken: str, capsys: pytest.CaptureFixture):
    add(folder, broken + json.dumps(line(60)) + "\n")
    log = RunLog(folder)
    assert log.unread == 1 and log.step == 60 and len(losses(log)) == 6
    assert main(["watch", str(folder)]) == 0 and "1 unreadable" in capsys.readouterr().out


def test_what_is_no_finite_number_is_no_point(tmp_path: Path, capsys: pytest.CaptureFixture):
    values = [None, float("nan"), float("inf"), "x", True, 10**400, [], {}, 2.5]
    lines = [line(i + 1) | {"loss": v, "grad_norm": v, "eval": {"a": v}} for i, v in enumerate(values)]
    log = RunLog(write(tmp_path / "odd", lines))
    for name in ("loss", "grad_norm", "eval/a"):
        assert dict(zip(*log.fields[name], strict=True)) == {9: 2.5}
    for count in range(1, len(lines) + 1):
        write(tmp_path / "odd", lines[:count])
        assert main(["watch", str(tmp_path / "odd")]) == 0
    assert "loss" in capsys.readouterr().out


def test_lines_that_are_cut_back_and_written_again_are_noticed_and_replaced(folder: Path):
    log = RunLog(folder)
    write(folder, [line(step) for step in (10, 20)])
    log.read()
    assert log.step == 20 and list(losses(log)) == [10, 20]
    assert [text for _, text in log.events] == ["the run went back from step 50 to 20: its lines are written again"]
    add(folder, json.dumps(line(30, loss=9.0)) + "\n")
    log.read()
    assert losses(log)[30] == 9.0 and len(log.events) == 1


def test_a_log_written_again_beyond_where_it_was_is_noticed(folder: Path):
    log = RunLog(folder)
    write(folder, [line(10), line(20), *(line(step, loss=7.0) for step in range(30, 91, 10))])
    log.read()
    assert losses(log) == losses(RunLog(folder)) and losses(log)[30] == 7.0
    assert "went back before step 50" in log.events[0][1]


def test_a_step_that_comes_again_replaces_what_followed_it(folder: Path):
    add(folder, json.dumps(line(30, loss=8.0, eval={"x": 1})) + "\n")
    log = RunLog(folder)
    assert list(losses(log)) == [10, 20, 30] and losses(log)[30] == 8.0 and log.step == 30
    assert log.events == [(30, "the run went back to step 30")]


def test_a_log_that_vanishes_is_a_run_that_has_not_logged(folder: Path):
    log = RunLog(folder)
    (folder / "log.jsonl").unlink()
    log.read()
    assert log.state().word == "waiting" and log.step == 0 and not log.fields


def test_what_happened_is_told_by_step(folder: Path):
    add(folder, json.dumps(line(60, left_out=3)) + "\n" + json.dumps(line(70, rolled_back_to=0, note="a spike")) + "\n")
    told = "\n".join(view([RunLog(folder)], ["clip"], time.time(), 100, None))
    assert "step 60: 3 of the updates left out" in told
    assert "step 70: rolled back to step 0" in told and "step 70: note: a spike" in told


def test_numbers_of_ranks_and_layers_are_kept_only_on_request(folder: Path):
    add(folder, json.dumps(line(60, rank_samples_per_s=[5.0, 9.0], layer_norms={"a": 1.0, "b": {"c": 2}})) + "\n")
    assert not [name for name in RunLog(folder).fields if "/" in name]
    names = RunLog(folder, whole=True).fields
    assert {"rank_samples_per_s/1", "layer_norms/a", "layer_norms/b/c"} <= names.keys()
    told = "\n".join(view([RunLog(folder)], ["clip"], time.time(), 100, None))
    assert "rank_samples_per_s  5 to 9 (2)" in told and "layer_norms  1 to 2 (2)" in told


def test_a_long_log_is_read_at_once(tmp_path: Path):
    folder = write(tmp_path / "long", [])
    text = json.dumps(line(7, samples_per_s=1.5, data_wait=0.1, grad_norm=2.5)).replace("7", "%d", 1) + "\n"
    (folder / "log.jsonl").write_text("".join(text % step for step in range(1, 50_001)))
    start = time.perf_counter()
    log = RunLog(folder)
    view([log], ["long"], time.time(), 80, 24)
    assert log.step == 50_000 and time.perf_counter() - start < 5


# --- how it stands ---------------------------------------------------------------------------------------------------
def test_states(folder: Path, tmp_path: Path):
    log = RunLog(folder)
    assert log.state(log.written + 20).word == "running"
    assert log.state(log.written + 99).word == "running"  # five times the usual 20 s are not over
    stalled = log.state(log.written + 600)
    assert stalled.word == "stalled" and "10 min" in stalled.text and "20 s" in stalled.text
    (folder / "model.safetensors").touch()
    assert RunLog(folder).state().word == "stalled" or RunLog(folder).state().word == "running"  # 50 of 100 steps
    write(folder, [line(100)])
    assert RunLog(folder).state().word == "finished"
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert RunLog(tmp_path / "new").state().word == "waiting"


def test_the_time_left_is_that_of_the_last_lines(folder: Path):
    log = RunLog(folder)
    assert log.left(log.written) == pytest.approx(100)  # 50 steps of 2 s
    assert log.left(log.written + 30) == pytest.approx(70)
    slow = [line(step) for step in range(1, 101)] + [line(100 + i, seconds=200 + i * 10.0) for i in range(1, 101)]
    assert RunLog(write(folder, slow, total=300)).left(0) == pytest.approx(1000)
    assert RunLog(write(folder, [line(10)])).left(0) == pytest.approx(180)
    assert RunLog(write(folder, [{"step": 1}, {"step": 2}])).left(0) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (48, "48 s"), (99.7, "2 min"), (3599, "1 h 00 min"), (4000, "1 h 07 min"), (2e5, "2 d 7 h")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


# --- what is shown ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("columns", [20, 40, 80, 120, 250])
@pytest.mark.parametrize("rows", [1, 5, 24, 60])
def test_a_view_fits_its_terminal(folder: Path, columns: int, rows: int):
    evals = {f"a long name of a number {i}": i / 7 for i in range(9)}
    add(folder, "".join(json.dumps(line(step, eval=evals, left_out=1)) + "\n" for step in range(60, 91)))
    for logs, names in (([RunLog(folder)], ["运行" * 30]), ([RunLog(folder)] * 3, ["a", "b", "c" * 99])):
        lines = view(logs, names, time.time(), columns, rows)
        assert 0 < len(lines) <= rows and max(map(width, lines)) <= columns


def test_an_ordinary_terminal_shows_position_numbers_curve_and_events(folder: Path):
    add(folder, json.dumps(line(60, eval={"recall": 0.5}, left_out=1, never_seen=17.25)) + "\n")
    log = RunLog(folder)
    told = "\n".join(view([log], ["clip"], log.written, 80, 24))
    for part in (
        "clip: pytorch, running",
        "step 60 of 100",
        "60%",
        "2 min so far",
        "80 s to go",
        "eval/recall",
        "17.25",
        "↘",
    ):
        assert part in told
    assert re.search("[⠁-⣿]", told) and "step 60: 1 of the updates" in told


def test_an_older_number_is_not_shown_as_of_now(folder: Path):
    add(folder, json.dumps(line(60, grad_norm=3.125)) + "\n" + json.dumps(line(70, grad_norm=None)) + "\n")
    told = "\n".join(view([RunLog(folder)], ["clip"], 0, 80, None))
    assert "grad_norm" in told and "3.125" not in told


def test_once_and_pipes_get_one_plain_picture(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["watch", str(folder), "--once"]) == 0
    told = capsys.readouterr().out
    assert "step 50 of 100" in told and "\x1b" not in told
    assert main(["watch", str(folder / "log.jsonl")]) == 0  # a log stands for its folder
    assert "clip: pytorch" in capsys.readouterr().out


def test_it_loads_nothing_heavy_and_writes_letters_that_the_output_has(folder: Path):
    code = (
        f"import sys, zoo.cli; zoo.cli.main(['watch', {str(folder)!r}]); "
        "print(*[m for m in ('torch', 'PIL', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stderr.split() == []
    assert "*" in run.stdout and "\\u" not in run.stdout


def test_several_runs_are_told_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    other = write(tmp_path / "b" / "clip", [line(step, loss=9.0) for step in (10, 20)])
    assert main(["watch", str(folder), str(other)]) == 0
    told = capsys.readouterr().out
    assert "b/clip: loss" in told and f"{tmp_path.name}/clip: loss" in told


# --- following -------------------------------------------------------------------------------------------------------
def in_terminal(folder: Path) -> tuple[subprocess.Popen, int]:
    """`zoo watch` on a terminal of its own, and where what it writes can be read."""
    ours, its = pty.openpty()
    code = "import sys; from zoo.cli import main; from zoo.commands import watch; watch.EVERY = 0.05; sys.exit(main())"
    command = [sys.executable, "-c", code, "watch", str(folder)]
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=ROOT, start_new_session=True)
    os.close(its)
    return process, ours


def read_until(terminal: int, wanted: str | None, deadline: float = 60) -> str:
    """What came until `wanted` was in it, or until the terminal was closed. Of a letter that is read in two parts, as
    the one before may have left it, what came is left out."""
    told, end = b"", time.monotonic() + deadline
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                told += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        if wanted is not None and wanted in told.decode(errors="ignore"):
            break
    found = told.decode(errors="ignore")
    assert wanted is None or wanted in found, f"{wanted!r} never came:\n{found}"
    return found


def test_reading_a_terminal_may_begin_within_a_letter():
    ours, its = pty.openpty()
    os.write(its, "⣿ step 6 ⣿".encode()[1:-1])
    os.close(its)
    assert read_until(ours, None) == " step 6 "
    os.close(ours)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_it_follows_until_it_is_told_to_leave_and_gives_the_terminal_back(folder: Path, sent: int, code: int):
    process, terminal = in_terminal(folder)
    try:
        read_until(terminal, "step 50 of 100")
        add(folder, json.dumps(line(60)) + "\n")
        read_until(terminal, "step 60 of 100")
        process.send_signal(sent)
        rest = read_until(terminal, None)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert watch.CLOSE in rest and "Traceback" not in rest
    assert ("step 60 of 100" in rest.partition(watch.CLOSE)[2]) is (code == 0)  # the last view stays


def test_it_ends_when_the_run_does(folder: Path):
    process, terminal = in_terminal(folder)
    try:
        read_until(terminal, "step 50 of 100")
        (folder / "model.safetensors").touch()
        add(folder, json.dumps(line(100)) + "\n")
        rest = read_until(terminal, None)
        assert process.wait(60) == 0 and "finished" in rest.partition(watch.CLOSE)[2]
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


# --- the picture -----------------------------------------------------------------------------------------------------
def test_a_plot_has_the_fields_asked_for(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    add(folder, json.dumps(line(60, eval={"loss": 2.0, "recall": 0.5}, layer_norms={"a": 1.0, "b": 2.0})) + "\n")
    out = tmp_path / "out.png"
    assert main(["watch", str(folder), "--plot", str(out), "--fields", "loss"]) == 0
    assert f"drawn: {out}" in capsys.readouterr().out
    one = Image.open(out).size
    assert main(["watch", str(folder), str(write(tmp_path / "b", [line(5)])), "--plot", str(out)]) == 0
    assert Image.open(out).size > one
    plain, whole = [RunLog(folder)], [RunLog(folder, whole=True)]
    assert watch.chosen(plain, None) == ["loss", "eval/recall", "lr"]  # eval/loss is dots among the losses
    assert watch.chosen(whole, "lr, layer_norms,loss,lr") == ["lr", "layer_norms/a", "layer_norms/b", "loss"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--plot", "x.png", "--fields", "los"], "nearest: loss"),
        (["--plot", "x.png", "--fields", ","], "loss,lr"),
        (["--plot", "x.nonsense"], "end the name in .png"),
        (["--fields", "loss"], "--plot FILE"),
        (["--smooth", "2"], "from 0 to 1"),
    ],
)
def test_what_cannot_be_drawn_is_said(folder: Path, more: list[str], said: str, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["watch", str(folder), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_a_step_cannot_be_drawn(tmp_path: Path):
    with pytest.raises(SettingsError, match="no step logged yet"):
        watch.chosen([RunLog(write(tmp_path / "new", []))], None)


# --- wrong folders ---------------------------------------------------------------------------------------------------
def test_a_wrong_folder_is_named_with_what_was_expected(folder: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match="no folder .*missing: .*settings.json and log.jsonl"):
        RunLog(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="empty is not the folder of a run: .*log.jsonl"):
        RunLog(tmp_path / "empty")
    with pytest.raises(SettingsError, match="give one of those in it: clip"):
        RunLog(tmp_path)
    with pytest.raises(SettingsError, match="named twice"):
        watch.names_of([RunLog(folder), RunLog(folder)])


def test_damaged_settings_do_not_keep_one_from_watching(folder: Path):
    for text in ("", "{", "[]", '{"total_steps": "many", "world_size": null}'):
        (folder / "settings.json").write_text(text)
        log = RunLog(folder)
        assert log.total is None and "step 50" in view([log], ["clip"], 0, 80, None)[1]
