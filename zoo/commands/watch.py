"""`zoo watch`: how runs get on, on the terminal while they go, or as curves in a picture."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from zoo.commands.run_log import RunLog, State
from zoo.commands.run_view import view
from zoo.errors import SettingsError, nearest
from zoo.plots.braille import plain

EXAMPLES = """\
examples:
  zoo watch runs/clip                                     until it ends; Ctrl-C leaves, the run goes on
  zoo watch runs/clip --once                              how it stands now
  zoo watch runs/clip runs/other --plot loss.png --fields loss,lr

Any number of log.jsonl can be a field, those of a group too: eval/loss, or eval for all of eval.
"""
PIPE_COLUMNS = 100  # where there is no terminal whose width counts
EVERY = 1.0  # seconds between two looks
ENDED = 143  # as a shell reports SIGTERM
OPEN, CLOSE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # a screen of our own without cursor; as it was
HOME, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("watch", help="how a run gets on, and its curves", epilog=EXAMPLES, **settings)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, as --run-folder of a training names them")
    parser.add_argument("--once", action="store_true", help="say how it stands and leave; so it is without a terminal")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves into this picture instead")
    parser.add_argument("--fields", metavar="NAMES", help="what to draw, with commas between (default: all)")
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="how far the mean of the thick line reaches, as a share of all steps; 0 for none (default: 0.01)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draws, tells once, or follows."""
    if not 0 <= args.smooth <= 1:
        raise SettingsError(f"--smooth {args.smooth}: give a share of the steps, from 0 to 1")
    if args.fields and not args.plot:
        raise SettingsError("--fields chooses what --plot draws: give --plot FILE too")
    logs = [RunLog(path, whole=bool(args.fields)) for path in args.runs]
    names = names_of(logs)
    if args.plot:
        plot(args.plot, logs, names, args.fields, args.smooth)
    elif args.once or not sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_COLUMNS
        print(as_written(view(logs, names, time.time(), columns, None)))
    else:
        follow(logs, names)
    return 0


def names_of(logs: Sequence[RunLog]) -> list[str]:
    """A name for each run: that of its folder, with those above it as far as needed to tell them apart."""
    parts = [log.folder.resolve().parts for log in logs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise SettingsError(f"the same run is named twice: {', '.join(str(log.folder) for log in logs)}")


def as_written(lines: Sequence[str]) -> str:
    """The lines as one text, in letters that the output has."""
    text = "\n".join(lines)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return plain(text)
    return text


def follow(logs: Sequence[RunLog], names: Sequence[str]) -> None:
    """Shows the runs on a screen of its own, again and again, until all have ended or Ctrl-C; leaves the last view."""
    with screen():
        try:
            while not over([log.state() for log in logs]):
                size = shutil.get_terminal_size()
                show(view(logs, names, time.time(), size.columns, size.lines - 2), size.columns)
                time.sleep(EVERY)
                for log in logs:
                    log.read()
        except KeyboardInterrupt:  # how one leaves
            pass
    print(as_written(view(logs, names, time.time(), shutil.get_terminal_size().columns, None)))


def over(states: Sequence[State]) -> bool:
    """Whether nothing more is to come: a stalled run may go on."""
    return all(state.word == "finished" for state in states)


def show(lines: Sequence[str], columns: int) -> None:
    """Writes a view over the one before, without a flicker, and how to leave."""
    leave = "Ctrl-C leaves; the run goes on"[:columns]
    lines = [line + REST_OF_LINE for line in as_written([*lines, "", leave]).split("\n")]
    sys.stdout.write(HOME + "\n".join(lines) + REST_OF_SCREEN)
    sys.stdout.flush()


@contextmanager
def screen() -> Iterator[None]:
    """A screen of its own inside, and the terminal as it was after, even when the process is told to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))
    try:
        sys.stdout.write(OPEN)
        yield
    finally:
        sys.stdout.write(CLOSE)
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)


# --- the picture -----------------------------------------------------------------------------------------------------
def plot(path: Path, logs: Sequence[RunLog], names: Sequence[str], fields: str | None, smooth: float) -> None:
    """Draws the fields of all runs into a file. Raises SettingsError on a field that no run has, or a bad file name."""
    from zoo.plots.panels import Panel, draw

    shown = chosen(logs, fields)
    panels = []
    for name in shown:
        found = {run: log.fields[name] for run, log in zip(names, logs, strict=True) if name in log.fields}
        judged = f"eval/{name}"
        dots = {run: log.fields[judged] for run, log in zip(names, logs, strict=True) if judged in log.fields}
        alone = name.startswith("eval/")
        panels.append(Panel(name, {} if alone else found, found if alone else {} if judged in shown else dots))
    title = f"{names[0]}: {logs[0].state().text}" if len(logs) == 1 else ""
    canvas = draw(panels, names, title=title, smoothing=smooth)
    try:
        canvas.save(path)
    except ValueError as error:  # Pillow knows no format of this ending
        raise SettingsError(f"--plot {path}: {error}; end the name in .png") from error
    print(f"drawn: {path}")


def chosen(logs: Sequence[RunLog], fields: str | None) -> list[str]:
    """The fields to draw: those named, or all but those of one rank or layer. Raises SettingsError."""
    there = list(dict.fromkeys(name for log in logs for name in log.fields))
    if not there:
        raise SettingsError(f"nothing to draw: no step logged yet in {', '.join(str(log.folder) for log in logs)}")
    if fields is None:
        plain_ones = [name for name in there if "/" not in name]
        judged = [name for name in there if name.startswith("eval/") and name.removeprefix("eval/") not in plain_ones]
        return sorted([*plain_ones, *judged], key=lambda name: (name != "loss", not name.startswith("eval/")))
    found: list[str] = []
    for name in filter(None, (part.strip() for part in fields.split(","))):
        members = [name] if name in there else [other for other in there if other.startswith(f"{name}/")]
        if not members:
            raise SettingsError(f"--fields {name}: not in the log; {nearest(name, there)}")
        found += members
    if not found:
        raise SettingsError("--fields names nothing: give names such as loss,lr")
    return list(dict.fromkeys(found))
