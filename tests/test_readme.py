"""The README's code runs, and prints what the README says it prints.

A `python` block is a program. In a `console` or `bash` block each line `$ command` is a command and what follows is its
output, up to the next `$`. A `text` block directly below a block is the output of the whole block. In an output `...`
stands for any text. Each block runs alone, offline, in an empty folder that has the clone's scripts beside it. A block
that cannot run says why, just above: `<!-- not run: reason -->`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SCRIPTS = ("examples", "benchmarks", "deepspeed_configs", "hostfile")
LANGUAGES = {"python": "python", "py": "python"} | dict.fromkeys(("console", "bash", "sh", "shell"), "console")
PROGRAMS = {"zoo", "python"}
SECONDS = 300  # for one command; a block that takes longer belongs to a benchmark


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block of a language that runs."""

    language: str
    line: int
    source: str
    output: str | None = None  # of the text block directly below
    excuse: str | None = None  # why it is not run

    @property
    def name(self) -> str:
        return f"{self.language}-line-{self.line}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One `$ command` of a console block."""

    words: list[str]
    output: str


FENCE = re.compile(
    r"^(?P<indent>[ ]*)(?P<fence>```+)(?P<info>[^`\n]*)\n(?P<source>.*?)^[ ]*(?P=fence)`*[ ]*$",
    re.MULTILINE | re.DOTALL,
)
EXCUSE = re.compile(r"<!-- not run: (\S.*?) -->\s*\Z", re.DOTALL)


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a markdown text that are to be run or excused."""
    fences = list(FENCE.finditer(text))
    for here, below in zip_longest(fences, fences[1:]):
        if (language := LANGUAGES.get(info_of(here))) is None:
            continue
        followed = below and info_of(below) == "text" and not text[here.end() : below.start()].strip()
        excuse = EXCUSE.search(text[: here.start()])
        yield Block(
            language=language,
            line=text.count("\n", 0, here.start()) + 1,
            source=textwrap.dedent(here["source"]),
            output=textwrap.dedent(below["source"]) if followed else None,
            excuse=excuse[1] if excuse else None,
        )


def info_of(fence: re.Match[str]) -> str:
    """The language of a fence: the first word after the backticks, or nothing."""
    return (fence["info"].split() or [""])[0].lower()


def commands(source: str) -> list[Command]:
    """The commands of a console block with the output that stands below each; a line that ends in `\\` goes on."""
    parts = re.split(r"^\$ ", source.replace("\\\n", ""), flags=re.MULTILINE)
    assert not parts[0].strip(), f"a console block begins with `$ `, or says why it is not run: {parts[0]!r}"
    found = []
    for part in parts[1:]:
        line, _, output = part.partition("\n")
        words = shlex.split(line, comments=True)
        assert words and words[0] in PROGRAMS, f"only {sorted(PROGRAMS)} are run; say why this is not: $ {line}"
        found.append(Command(words=words, output=output))
    return found


def agrees(expected: str, printed: str) -> bool:
    """Whether a program printed what is shown. `...` stands for any text; ends of lines and of the text are free."""
    expected, printed = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (expected, printed))
    return re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), printed, flags=re.DOTALL) is not None


def run(words: list[str], folder: Path) -> str:
    """What a command prints on its standard output, run offline; it must end with 0."""
    settings = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    settings |= {"HF_HUB_OFFLINE": "1", "ZOO_HOME": str(folder / "zoo_home")}
    settings["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        words, cwd=folder, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{shlex.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def check(block: Block, folder: Path) -> None:
    """Run a block in `folder` and compare what it prints with what is shown."""
    if block.language == "python":
        (folder / "block.py").write_text(block.source, encoding="utf-8")
        printed = run([sys.executable, "block.py"], folder)
    else:
        printed = ""
        for command in commands(block.source):
            answer = run(command.words, folder)
            if command.output.strip():
                assert agrees(command.output, answer), differ(command.output, answer)
            printed += answer
    if block.output is not None:
        assert agrees(block.output, printed), differ(block.output, printed)


def differ(expected: str, printed: str) -> str:
    return f"the README shows\n{expected.strip()}\nand the program printed\n{printed.strip()}"


TEXT = README.read_text(encoding="utf-8") if README.exists() else ""


@pytest.mark.parametrize("block", [block for block in blocks(TEXT) if not block.excuse], ids=lambda block: block.name)
def test_a_block_of_the_readme_runs(block: Block, tmp_path: Path):
    for name in SCRIPTS:
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    check(block, tmp_path)


def test_the_readme_shows_a_program_and_a_command():
    run_here = {block.language for block in blocks(TEXT) if not block.excuse}
    assert run_here == {"python", "console"}, "README.md is missing, or none of its blocks is run"


# --- the reading of markdown and the comparing, each tried on a small text -------------------------------------------
SAMPLE = """\
# Title

```python
print("one")
```

```text
one
```

<!-- not run: needs a GPU -->
```bash
$ make demo
```

Words between.

```console
$ zoo list \\
    --all
a ... b
$ zoo info x  # a note
```

1. In a list:

   ```python
   if True:
       pass
   ```

   Not directly below:

   ```text
   two
   ```

````text
```python
not a block of its own
```
````
"""


def test_blocks_are_found_with_their_output_and_excuse():
    one, two, three, four = blocks(SAMPLE)
    assert one == Block(language="python", line=3, source='print("one")\n', output="one\n")
    assert (two.name, two.excuse) == ("console-line-12", "needs a GPU")
    assert (three.language, three.excuse, three.output) == ("console", None, None)
    assert (four.source, four.output) == ("if True:\n    pass\n", None)


@pytest.mark.parametrize("comment", ["<!-- not run: -->", "<!-- not run -->", "<!-- not run: x -->\nwords"])
def test_an_excuse_gives_a_reason_and_stands_just_above(comment: str):
    (block,) = blocks(f"{comment}\n```python\npass\n```\n")
    assert block.excuse is None


def test_a_console_block_is_commands_with_their_outputs():
    listing, info = commands(list(blocks(SAMPLE))[2].source)
    assert listing == Command(words=["zoo", "list", "--all"], output="a ... b\n")
    assert info == Command(words=["zoo", "info", "x"], output="")


@pytest.mark.parametrize("source", ["zoo list\n", "$ make test\n", "$ rm x\n", "$ \n"])
def test_a_console_block_that_would_not_be_run_needs_an_excuse(source: str):
    with pytest.raises(AssertionError, match="why"):
        commands(source)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a\nb\n", "a  \nb", True),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("loss ...", "loss 0.25", True),
        ("a.b", "axb", False),
        ("a\n...", "b\na\nc", False),
        ("a", "a\nb", False),
        ("", "a", False),
    ],
)
def test_outputs_are_compared(expected: str, printed: str, same: bool):
    assert agrees(expected, printed) is same


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nprint(1)\n```\n```text\n2\n```\n", "the README shows"),
        ("```python\nraise SystemExit(3)\n```\n", "ended with 3"),
        ("```console\n$ python -c 'print(1)'\n2\n```\n", "the README shows"),
        ("```console\n$ python -c 'raise SystemExit(3)'\n```\n", "ended with 3"),
    ],
)
def test_a_block_that_lies_or_fails_is_caught(text: str, complaint: str, tmp_path: Path):
    (block,) = blocks(text)
    with pytest.raises(AssertionError, match=complaint):
        check(block, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nimport os\nprint(os.environ['HF_HUB_OFFLINE'], os.listdir())\n```\n```text\n1 ['block.py']\n```\n",
        '```console\n$ python -c \'open("x", "w")\'\n$ python -c \'print(open("x"))\'\n<...>\n```\n',
    ],
)
def test_a_block_that_tells_the_truth_passes(text: str, tmp_path: Path):
    (block,) = blocks(text)
    check(block, tmp_path)
