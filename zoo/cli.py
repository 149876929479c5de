"""The command line. Thin: each command is a file of zoo/commands, and imports what it needs when it is run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from zoo import __version__
from zoo.commands import catalog, data, demo, evaluate, export, generate, launch, match, plan, train, watch
from zoo.errors import SettingsError, ZooError

COMMANDS = (catalog, match, generate, data, plan, train, launch, watch, evaluate, export, demo)
FAILED, STOPPED, PIPE_CLOSED = 2, 130, 141  # the latter two as a shell reports SIGINT and SIGPIPE
EPILOG = """\
start here, without network:
  zoo demo                                                  a tour of what zoo does
  zoo list                                                  the models there are
  zoo match cat.png --text "a cat" --text "a dog"           which caption fits a picture
  zoo generate "a red apple" --n 4                          draw pictures of a text
  zoo train clip --steps 200 --run-folder runs/first        train on the packaged data
  zoo watch runs/first                                      how it gets on, and its curves

then:
  zoo info clip-base-p32-224                                licence, files, figures
  zoo plan clip-base-p32-224 --batch-size 64                what training it will need, and which setup fits
  zoo pull clip-base-p32-224                                download and verify
  zoo match cat.png --text "a cat" --text "a dog" --model clip-base-p32-224
  zoo launch --num-gpus 2 examples/train_clip.py            the same training in two processes

`zoo COMMAND --help` says more about each.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: one line, the same exit code."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see `{self.prog} --help`")


def build_parser() -> Parser:
    """The parser of all commands."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error arose")
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="zoo",
        description="CLIP, DALL-E, CLIP-GEN and Stable Diffusion: load by name, match, generate, train, measure.",
        epilog=EPILOG,
        formatter_class=shape,
        parents=[shared],
    )
    parser.add_argument("--version", action="version", version=f"zoo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(commands, parents=[shared], formatter_class=shape)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command -> the exit code: 0, 2 for what the user can mend, 130 when stopped, 141 when nobody reads."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            code = run(argv)
        except SystemExit as leaving:  # --help and --version
            code = leaving.code or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What is still buffered has no reader; without this, Python complains when it is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt as stopped:  # a training says how to go on
        print(f"zoo: {stopped}" if str(stopped) else "zoo: stopped", file=sys.stderr)
        return STOPPED


def run(argv: list[str]) -> int:
    """Parses and runs; an error that names its remedy becomes one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of few letters gets \\u escapes rather than an exception
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in argv
    try:
        args = build_parser().parse_args(argv)
        return args.run(args)
    except BrokenPipeError:
        raise
    except (ZooError, OSError) as error:
        if debug:
            raise
        ours = isinstance(error, ZooError) or not error.filename
        text = str(error) if ours else f"{error.filename}: {error.strerror}"
        print(f"zoo: {' '.join(text.split())}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
