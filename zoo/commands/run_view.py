"""Runs as text, for a terminal of some width and height: where they are, their numbers, curves and events."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.commands.run_log import RunLog, duration, flat, number
from zoo.commands.tables import fit, in_bytes, width
from zoo.plots.braille import ARROWS, curve, sparkline
from zoo.plots.series import Series, trend

NAME, REST = 14, 25  # places of a number's name, and of its value, trend and course
LONGEST = 36  # of the places of names, where they are longer
NARROW, LOW, HIGH = 40, 6, 12  # a curve: columns at least, lines at least, lines at most where the height is free
EVENTS = 5
SHARES = ("data_wait", "comm")  # of the time, 0 to 1


def view(logs: Sequence[RunLog], names: Sequence[str], now: float, columns: int, rows: int | None) -> list[str]:
    """All of the runs in lines of `columns` places; in `rows` lines at most, if that is not None."""
    lines: list[str] = []
    for log, name in zip(logs, names, strict=True):
        lines += heading(log, name, now, columns)
        if len(logs) == 1:
            lines += ["", *numbers(log, columns)] if log.line else []
    happened = events(logs, names)
    spare = None if rows is None else rows - len(lines) - len(happened)
    drawn = curves(logs, names, columns, spare)
    # Where all does not fit, the end is cut: what stands first matters most.
    return [fit(line, columns).rstrip() for line in [*lines, *drawn, *happened][:rows]]


def heading(log: RunLog, name: str, now: float, columns: int) -> list[str]:
    """The run's name and state, and how far it is."""
    settings = log.settings
    processes = settings.get("world_size") or 1
    about = [str(settings["env_type"])] if settings.get("env_type") else []
    about += [f"{processes} processes"] if processes != 1 else []
    about += [log.state(now).text]
    if log.unread:
        about.append(f"{log.unread} unreadable lines left out")
    lines = [f"{name}: {', '.join(about)}"]
    if not log.line:
        return lines
    done = f"step {log.step:,}"
    if log.total:
        share = min(log.step / log.total, 1)
        filled = int(share * 20)
        done = f"{'█' * filled}{'░' * (20 - filled)} {share:4.0%}  {done} of {log.total:,}"
    told = [done]
    for word, form in (("epoch", "epoch {:.0f}"), ("seconds", "")):
        values = log.position[word].values
        told += [form.format(values[-1]) if form else f"{duration(values[-1])} so far"] if len(values) else []
    left = log.left(now)
    if log.state(now).word == "running" and left is not None and log.step < log.total:
        told.append(f"{duration(left)} to go")
    return [*lines, fit(", ".join(told), columns).rstrip()]


def numbers(log: RunLog, columns: int) -> list[str]:
    """The last value of each field, whether it rises, and its course; then those of the evaluation.

    Of a group of many, as the numbers of ranks or layers, the lowest and the highest of the last line.
    """
    shown = {name: series for name, series in log.fields.items() if "/" not in name and len(series.steps)}
    judged = {name: log.fields[name] for name in log.fields if name.startswith("eval/") and len(log.fields[name].steps)}
    cells = [cell(name, series, NAME, series.steps[-1] == log.line["step"]) for name, series in shown.items()]
    for name, group in log.line.items():
        if isinstance(group, (dict, list)) and name != "eval":
            values = [value for _, one in flat(name, group) if (value := number(one)) is not None]
            text = f"{written(name, min(values))} to {written(name, max(values))} ({len(values)})" if values else "-"
            cells.append(f"{name}  {text}")
    places = min(max(map(width, judged), default=0), LONGEST)
    # An evaluation's last number holds until the next; any other that the last line has not got is unknown.
    judged_cells = [cell(name, series, places, True) for name, series in judged.items()]
    return [*in_columns(cells, NAME + REST, columns), *in_columns(judged_cells, places + REST, columns)]


def cell(name: str, series: Series, places: int, known: bool) -> str:
    """A number with its name in so many places, trend and course."""
    value = fit(written(name, series.values[-1]) if known else "-", 9, right=True)
    return f"{fit(name, places)} {value} {ARROWS[trend(series.values)]} {sparkline(series, 12)}"


def in_columns(cells: Sequence[str], places: int, columns: int) -> list[str]:
    """The cells below each other, in as many columns of `places` as there is room for."""
    across = max(1, (columns + 2) // (places + 2))
    down = -(-len(cells) // across)
    return ["  ".join(fit(cell, places) for cell in cells[row::down]).rstrip() for row in range(down)]


def written(name: str, value: float) -> str:
    """A number as a person reads it."""
    if name.startswith("bytes"):
        return in_bytes(value)
    if name in SHARES:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 9999.5 and abs(value) < 1e12 else f"{value:.4g}"


def curves(logs: Sequence[RunLog], names: Sequence[str], columns: int, rows: int | None) -> list[str]:
    """The loss and each evaluation number over steps; of several runs the loss alone, all on one scale."""
    if len(logs) == 1:
        fields = logs[0].fields
        chosen = [(name, fields[name], None) for name in fields if name == "loss" or name.startswith("eval/")]
    else:
        losses = [(name, log.fields["loss"]) for log, name in zip(logs, names, strict=True) if "loss" in log.fields]
        values = [value for _, series in losses for value in (min(series.values), max(series.values))]
        chosen = [(f"{name}: loss", series, (min(values), max(values))) for name, series in losses]
    chosen = [(name, series, span) for name, series, span in chosen if len(series.steps)]
    if not chosen:
        return []
    last = max(max(log.step, log.total or 0) for log in logs)
    across = min(max(1, columns // NARROW), len(chosen))
    down = -(-len(chosen) // across)
    if rows is not None:
        down = min(down, rows // LOW)
        if down < 1:
            return []
    # A blank line and the name stand above each curve.
    height = HIGH if rows is None else min(rows // down - 2, 3 * HIGH)
    room = (columns - 2 * (across - 1)) // across
    lines: list[str] = []
    for row in range(down):
        blocks = [
            [name, *curve(Series(*series), room, height, last=last, span=span)]
            for name, series, span in chosen[row * across : (row + 1) * across]
        ]
        lines += ["", *beside(blocks, room)]
    hidden = [name for name, _, _ in chosen[down * across :]]
    if hidden:
        lines[0] = fit(f"not drawn, for want of lines: {', '.join(hidden)}", columns)
    return lines


def beside(blocks: Sequence[Sequence[str]], room: int) -> list[str]:
    """Blocks of lines next to each other, each `room` places wide."""
    tall = max(map(len, blocks))
    filled = [[*block, *[""] * (tall - len(block))] for block in blocks]
    return ["  ".join(fit(line, room) for line in row).rstrip() for row in zip(*filled, strict=True)]


def events(logs: Sequence[RunLog], names: Sequence[str]) -> list[str]:
    """The last things that happened to the runs, the latest at the end."""
    several = max(map(width, names)) if len(logs) > 1 else 0
    found = []
    for log, name in zip(logs, names, strict=True):
        whose = f"{fit(name, several)}  " if several else ""
        found += [(step, f"  {whose}step {step:,.0f}: {text}") for step, text in log.events]
    found.sort(key=lambda event: event[0])
    if not found:
        return []
    more = f" (the last {EVENTS} of {len(found):,})" if len(found) > EVENTS else ""
    return ["", f"events{more}", *(text for _, text in found[-EVENTS:])]
