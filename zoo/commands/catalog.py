"""`zoo list`, `zoo info` and `zoo pull`: what exists, what a model is, and its files onto this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.commands.tables import as_json, in_bytes, in_millions, table
from zoo.errors import SettingsError, UnknownModel, nearest

if TYPE_CHECKING:
    from zoo.catalog import Card
    from zoo.hub import File

LIST_EXAMPLES = """\
examples:
  zoo list
  zoo list --task txt_img_matching --json
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the three commands."""
    listing = commands.add_parser("list", help="the models there are", epilog=LIST_EXAMPLES, **settings)
    listing.set_defaults(run=run_list)
    info = commands.add_parser("info", help="all that is known of a model", **settings)
    info.set_defaults(run=run_info)
    pull = commands.add_parser("pull", help="download a model and verify it", **settings)
    pull.set_defaults(run=run_pull)
    for parser in (info, pull):
        parser.add_argument("name", metavar="NAME", help="a name that `zoo list` shows")
    for parser in (listing, info, pull):
        parser.add_argument("--task", help="only models for this task, such as txt_img_matching")
        parser.add_argument(
            "--model-dir", type=Path, metavar="FOLDER", help="where downloads live (default: the cache)"
        )
    for parser in (listing, info):
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run_list(args: argparse.Namespace) -> int:
    """Prints one line for each model."""
    from zoo.catalog import cards

    found = [about(card, args.model_dir) for card in cards(args.task)]
    if args.json:
        print(as_json(found))
        return 0
    header = ["task", "name", "params", "size", "licence", "here"]
    rows = [
        [row["task"], row["name"], in_millions(row["params"]), in_bytes(row["size"]), row["licence"], row["here"]]
        for row in found
    ]
    print(table(header, rows, right=(2, 3)))
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Prints the whole card."""
    card = card_of(args.name, args.task)
    found = about(card, args.model_dir)
    if args.json:
        print(as_json(found))
        return 0
    print(card.name)
    lines = [
        ("task", card.task),
        ("family", card.family),
        ("parameters", in_millions(card.params) if card.params else "as its weights say"),
        ("computes in", card.dtype),
        ("languages", ", ".join(card.languages)),
        *([("trained", card.trained)] if card.trained else []),
        ("licence", card.licence if card.commercial else f"{card.licence} (not for commercial use)"),
        ("source", card.source),
        *((f"figure {name}", f"{value:g}") for name, value in card.figures.items()),
        *((f"config {name}", value) for name, value in flat(card.config or {})),
        ("folder", found["folder"]),
    ]
    places = max(len(name) for name, _ in lines)
    print("\n".join(f"  {name.ljust(places)}  {value}" for name, value in lines))
    for kind, files in (("file", found["files"]), ("in its place", found["alternatives"])):
        for file in files:
            print(f"  {kind} {file['name']}: {in_bytes(file['size'])}, {'here' if file['here'] else 'not here'}")
            print(f"    from {' or '.join(file['sources']) or 'nowhere: put it there by hand'}")
            print(f"    sha256 {file['sha256'] or 'not pinned'}")
    if card.files:
        print(f'  use: AutoLoader(task_name="{card.task}", model_name="{card.name}")')
    else:
        print(f'  use: AutoLoader(task_name="{card.task}", model_name="{card.name}", weights="FILE OR FOLDER")')
    return 0


def run_pull(args: argparse.Namespace) -> int:
    """Downloads what is not here, with a bar for each file, and says where it is."""
    from zoo.auto_loader import fetch_weights, folder_of
    from zoo.hub import fetch, is_here

    card = card_of(args.name, args.task)
    if not card.files:
        raise SettingsError(f"{card.name} stands for local weights of any size and has nothing to download")
    folder = folder_of(card, args.model_dir)
    files = (card.files[0], *card.alternatives, *filter(None, [card.config_file]), *card.files[1:])
    before = {file for file in files if is_here(file, folder)}
    came = [fetch_weights(card, folder)]
    came += [(file, fetch(file, folder)) for file in files[1 + len(card.alternatives) :]]
    for file, path in came:
        checked = "packaged" if file.packaged else "sha256 verified" if file.sha256 else "no sha256 published"
        got = "was here" if file in before else "downloaded"
        print(f"{path}: {in_bytes(path.stat().st_size)}, {got}, {checked}")
    return 0


def card_of(name: str, task: str | None) -> Card:
    """The card of a name, in whatever task if none is given. Raises UnknownTask and UnknownModel."""
    from zoo.catalog import cards, find

    if task:
        return find(task, name)
    found = [card for card in cards() if card.name.lower() == name.lower()]
    if not found:
        raise UnknownModel(f"no model {name!r}; {nearest(name, [card.name for card in cards()])}")
    if len(found) > 1:
        tasks = " or ".join(card.task for card in found)
        raise SettingsError(f"{name} is a model for several tasks: say --task {tasks}")
    return found[0]


def about(card: Card, model_dir: Path | None) -> dict[str, Any]:
    """A card as JSON can hold it. `here`: yes, part, no, or - for a card without files."""
    from zoo.auto_loader import folder_of
    from zoo.hub import is_here

    folder = folder_of(card, model_dir)
    files, alternatives = (
        [
            {"name": f.name, "size": f.size, "sha256": f.sha256, "sources": sources(f), "here": is_here(f, folder)}
            for f in some
        ]
        for some in (card.files, card.alternatives)
    )
    present = {file["here"] for file in files}
    return {
        "task": card.task,
        "name": card.name,
        "family": card.family,
        "params": card.params,
        "dtype": card.dtype,
        "size": sum(file["size"] or 0 for file in files) or None,
        "licence": card.licence,
        "commercial": card.commercial,
        "languages": list(card.languages),
        "source": card.source,
        "figures": dict(card.figures),
        "trained": card.trained,
        "config": card.config,
        "folder": str(folder),
        "files": files,
        "alternatives": alternatives,
        "here": "-" if not files else "part" if len(present) == 2 else "yes" if True in present else "no",
    }


def sources(file: File) -> list[str]:
    """Where a file can be had, in the order in which it is tried."""
    hub = [f"{file.repo} on the hub, {file.path or file.name}"] if file.repo else []
    if file.archive:
        return [f"{file.path or file.name} in {source}" for source in sources(file.archive)]
    return [*(["zoo itself"] if file.packaged else []), *filter(None, [file.url, *file.mirrors]), *hub]


def flat(config: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested sizes -> dotted names and values."""
    lines: list[tuple[str, str]] = []
    for name, value in config.items():
        lines += flat(value, f"{above}{name}.") if isinstance(value, dict) else [(above + name, str(value))]
    return lines
