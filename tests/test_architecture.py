"""The walls of the house. A rule reads one file's source and returns what breaks it; each is tried on a planted fault.

Only the standard library reads the source (`ast`): nothing of zoo is imported here, except by a fresh interpreter.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
ANY = None

# Who may import whom. A room is the first part of a path below zoo/. `errors` is open to all, and a room to itself.
MAY_IMPORT: dict[str, set[str] | None] = {
    "errors": set(),
    "devices": set(),
    "distributed": set(),
    "generation": set(),
    "tokenizers": set(),
    "converters": set(),
    "metrics": set(),
    "pictures": set(),
    "plots": {"pictures"},
    "hub": set(),
    "weights": {"devices"},
    "data": set(),
    "blocks": {"distributed", "devices"},
    "models": {"blocks", "generation", "distributed"},
    "catalog": {"models", "converters", "tokenizers", "data", "metrics", "hub"},
    "auto_loader": {"catalog", "hub", "weights", "devices", "optimization"},
    "additions": {"weights", "converters", "models", "tokenizers"},
    "training": {"weights", "distributed", "devices"},
    "optimization": set(),
    "cli": ANY,
    "commands": ANY,
    "app": ANY,
    "__init__": ANY,
}
LIGHT = ["zoo", "zoo.errors", "zoo.hub", "zoo.catalog", "zoo.cli"]  # importing these must cost no torch
HEAVY = ["torch", "transformers", "deepspeed"]
LONGEST_FILE, LONGEST_FUNCTION = 300, 60

DEEPSPEED_FILE = "zoo/training/engines/deepspeed.py"
PROCESS_FILES = ("zoo/distributed.py", "zoo/training/engines/")
ENVIRONMENT_FILES = ("zoo/hub/__init__.py", "zoo/training/launch.py", "zoo/training/engines/")
ENV_TYPE_FILES = ("zoo/training/engines/",)

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_ARGUMENTS = {("strict", False), ("weights_only", False), ("allow_pickle", True), ("shell", True)}
DRAWERS = {"util", "utils", "helper", "helpers", "common"}  # names that say nothing of what is inside
TRAINER_OWNS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "torch_autocast",
    "optimizer",
    "scheduler",
}


# --- reading the source ----------------------------------------------------------------------------------------------
def room_of(path: str) -> str:
    """zoo/training/engines/ddp.py -> training; zoo/hub.py -> hub."""
    return PurePosixPath(path).parts[1].removesuffix(".py")


def module_of(path: str) -> str:
    """zoo/weights/__init__.py -> zoo.weights; zoo/hub.py -> zoo.hub."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of all that is imported: relative names made whole, `from a import b` as `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                package = PurePosixPath(path).parts[: -node.level]
                base = [*package, *base]
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno


def called(node: ast.Call) -> str:
    """The last name of what is called: `importlib.import_module(...)` -> import_module."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def is_lazy_name(path: str, node: ast.Call) -> bool:
    """A package's own lazy names, `import_module(f".{name}", __name__)` in its `__init__.py`: they stay in the room."""
    form = r"(importlib\.)?import_module\(f'\.\{.*, __name__\)"
    return path.endswith("/__init__.py") and re.fullmatch(form, ast.unparse(node)) is not None


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when the file is imported: not those in functions or for type checkers."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                waiting += child.orelse
                continue
            waiting.append(child)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


# --- the rules: (path below the repository, source) -> faults --------------------------------------------------------
def rooms_import_by_the_table(path: str, source: str) -> list[str]:
    if not path.startswith("zoo/"):
        return []
    room = room_of(path)
    if room not in MAY_IMPORT:
        return [f"{path}: the room {room!r} is not in the table"]
    allowed = MAY_IMPORT[room]
    if allowed is ANY:
        return []
    faults = []
    for name, line in imports(path, ast.walk(ast.parse(source))):
        if not within(name, "zoo") or name == "zoo.__version__":
            continue
        # `from zoo import AutoLoader` and `import zoo` ask the public face, which knows every room.
        asked = name.split(".")[1] if name.count(".") and name.split(".")[1] in MAY_IMPORT else "__init__"
        if asked not in {"errors", room, *allowed}:
            faults.append(f"{path}:{line}: {room} may not import {name}")
    return faults


def imports_are_written_out(path: str, source: str) -> list[str]:
    """An import by a computed name would pass unseen under every other rule."""
    if not path.startswith("zoo/") or path == "zoo/__init__.py":
        return []
    return [
        f"{path}:{node.lineno}: imports a computed name"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__")
        if not (node.args and isinstance(node.args[0], ast.Constant)) and not is_lazy_name(path, node)
    ]


def deepspeed_has_one_file(path: str, source: str) -> list[str]:
    if not path.startswith("zoo/") or path == DEEPSPEED_FILE:
        return []
    found = imports(path, ast.walk(ast.parse(source)))
    return [f"{path}:{line}: deepspeed is {DEEPSPEED_FILE}'s" for name, line in found if within(name, "deepspeed")]


def processes_meet_in_two_places(path: str, source: str) -> list[str]:
    if not path.startswith("zoo/") or path.startswith(PROCESS_FILES):
        return []
    tree = ast.parse(source)
    lines = [line for name, line in imports(path, ast.walk(tree)) if within(name, "torch.distributed")]
    lines += [
        n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.distributed"
    ]
    return [f"{path}:{line}: torch.distributed belongs to {' and '.join(PROCESS_FILES)}" for line in lines]


def nothing_unpickles(path: str, source: str) -> list[str]:
    if not path.startswith("zoo/"):
        return []
    found = imports(path, ast.walk(ast.parse(source)))
    return [f"{path}:{line}: {name} can execute what it reads" for name, line in found if name.split(".")[0] in PICKLES]


def the_environment_is_read_at_the_rim(path: str, source: str) -> list[str]:
    if not path.startswith("zoo/") or path.startswith(ENVIRONMENT_FILES):
        return []
    tree = ast.parse(source)
    names = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    lines = [line for name, line in imports(path, ast.walk(tree)) if name in names]
    lines += [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) in names]
    return [f"{path}:{line}: reads the environment; pass a setting instead" for line in lines]


def nothing_branches_on_a_name(path: str, source: str) -> list[str]:
    """A card says what differs between models, and build_engine alone reads env_type."""
    if not path.startswith("zoo/"):
        return []
    words = {"model_name"} if path.startswith(ENV_TYPE_FILES) else {"model_name", "env_type"}
    faults = []
    for node in ast.walk(ast.parse(source)):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        named = {getattr(side, "attr", getattr(side, "id", None)) for side in sides} & words
        if named and any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in sides):
            faults.append(f"{path}:{node.lineno}: branches on {', '.join(named)}")
    return faults


def only_commands_print(path: str, source: str) -> list[str]:
    if not path.startswith("zoo/") or room_of(path) in ("cli", "commands"):
        return []
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"{path}:{c.lineno}: prints" for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def no_forbidden_arguments(path: str, source: str) -> list[str]:
    if not path.startswith(("zoo/", "examples/")):
        return []
    return [
        f"{path}:{node.lineno}: {keyword.arg}={keyword.value.value}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
        if (keyword.arg, keyword.value.value) in FORBIDDEN_ARGUMENTS
    ]


def no_bare_except(path: str, source: str) -> list[str]:
    handlers = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler))
    return [f"{path}:{node.lineno}: a bare except" for node in handlers if node.type is None]


def files_are_short(path: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return (
        [f"{path}: {lines} lines, {LONGEST_FILE} at most"] if path.startswith("zoo/") and lines > LONGEST_FILE else []
    )


def functions_are_short(path: str, source: str) -> list[str]:
    if not path.startswith("zoo/"):
        return []
    return [
        f"{path}:{node.lineno}: {node.name} has {lines} lines, {LONGEST_FUNCTION} at most"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    ]


def files_are_named_for_what_they_hold(path: str, source: str) -> list[str]:
    words = {word for part in PurePosixPath(path).with_suffix("").parts for word in part.split("_")}
    return [f"{path}: {word!r} names no content" for word in sorted(words & DRAWERS)]


def one_number_has_one_owner(path: str, source: str) -> list[str]:
    if not path.startswith("deepspeed_configs/"):
        return []
    config = json.loads(source)
    if "enabled" not in config.get(
        "bf16", {"enabled": True}
    ):  # what only DeepSpeed knows of bf16, not whether it is on
        del config["bf16"]
    return [f"{path}: {key} is the Trainer's" for key in sorted(TRAINER_OWNS & set(config))]


RULES: list[Callable[[str, str], list[str]]] = [
    rooms_import_by_the_table,
    imports_are_written_out,
    deepspeed_has_one_file,
    processes_meet_in_two_places,
    nothing_unpickles,
    the_environment_is_read_at_the_rim,
    nothing_branches_on_a_name,
    only_commands_print,
    no_forbidden_arguments,
    no_bare_except,
    files_are_short,
    functions_are_short,
    files_are_named_for_what_they_hold,
    one_number_has_one_owner,
]


def cycles(sources: dict[str, str]) -> list[str]:
    """Files that import each other while being imported, as `zoo.a -> zoo.b -> zoo.a`; each cycle once."""
    files = {module_of(path): path for path in sources}
    graph = {}
    for module, path in files.items():
        names = [name for name, _ in imports(path, at_import(ast.parse(sources[path])))]
        # `from zoo.a import b`: b is a file zoo/a/b.py, or a name inside zoo/a.
        found = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = sorted((found & files.keys()) - {module})
    done: set[str] = set()
    trail: list[str] = []
    rings: list[str] = []

    def visit(module: str) -> None:
        if module in trail:
            rings.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            trail.append(module)
            for other in graph[module]:
                visit(other)
            done.add(trail.pop())

    for module in graph:
        visit(module)
    return rings


def table_in(text: str) -> dict[str, set[str] | None]:
    """The table of CONTRIBUTING.md under "Who may import whom", in the form of MAY_IMPORT."""
    section = re.split(r"^## ", text.partition("## Who may import whom")[2], flags=re.MULTILINE)[0]
    table = {}
    for rooms, allowed in re.findall(r"^\| (`.+?`) \| (.*?) \|$", section, flags=re.MULTILINE):
        for room in re.findall(r"`(\w+)`", rooms):
            table[room] = ANY if allowed == "anything" else set(re.findall(r"`(\w+)`", allowed))
    return table


# --- the house obeys -------------------------------------------------------------------------------------------------
def sources(*patterns: str) -> dict[str, str]:
    paths = (path for pattern in patterns for path in sorted(ROOT.glob(pattern)))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


HOUSE = sources("zoo/**/*.py", "examples/**/*.py", "benchmarks/**/*.py", "tests/**/*.py")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_obeys(rule: Callable[[str, str], list[str]]):
    files = sources("deepspeed_configs/*.json") if rule is one_number_has_one_owner else HOUSE
    assert files
    faults = [fault for path, source in files.items() for fault in rule(path, source)]
    assert not faults, "\n" + "\n".join(faults)


def test_no_two_files_import_each_other():
    assert not cycles({path: source for path, source in HOUSE.items() if path.startswith("zoo/")})


def test_every_room_of_the_table_may_import_only_rooms_of_the_table():
    assert set().union(*(rooms or () for rooms in MAY_IMPORT.values())) <= set(MAY_IMPORT)


def test_contributing_shows_the_table():
    assert table_in((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")) == MAY_IMPORT


@pytest.mark.parametrize("module", LIGHT)
def test_importing_costs_no_torch(module: str):
    assert not heavy_after(module)


def test_the_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(HOUSE["zoo/__init__.py"])
    seen = {name.rpartition(".")[::2] for name, _ in imports("zoo/__init__.py", ast.walk(tree)) if within(name, "zoo")}
    tables = {ast.unparse(n.targets[0]): ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)}
    assert seen == {(room, name) for name, room in tables["_ROOM_OF"].items()}
    assert set(tables["__all__"]) == {*tables["_ROOM_OF"], "__version__"}


def heavy_after(module: str) -> list[str]:
    """The heavy packages that a fresh interpreter holds after `import module`."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"import {module} fails:\n{run.stderr}"
    return run.stdout.split()


# --- each rule catches its fault -------------------------------------------------------------------------------------
TORCH_DISTRIBUTED = "import torch.distributed as dist"
PLANTED = [
    (rooms_import_by_the_table, "zoo/models/clip.py", "from zoo.training import Trainer"),
    (rooms_import_by_the_table, "zoo/models/clip.py", "def build():\n    from zoo.data import CsvDataset"),
    (rooms_import_by_the_table, "zoo/models/clip.py", "from ..weights import read"),
    (rooms_import_by_the_table, "zoo/models/clip.py", "from .. import weights"),
    (rooms_import_by_the_table, "zoo/training/trainer.py", "from zoo import data"),
    (rooms_import_by_the_table, "zoo/training/engines/ddp.py", "from ...models import clip"),
    (rooms_import_by_the_table, "zoo/blocks/a.py", "from zoo import AutoLoader"),
    (rooms_import_by_the_table, "zoo/blocks/a.py", "import zoo"),
    (rooms_import_by_the_table, "zoo/blocks/a.py", "importlib.import_module('zoo.hub')"),
    (rooms_import_by_the_table, "zoo/errors.py", "import zoo.hub"),
    (rooms_import_by_the_table, "zoo/cellar/wine.py", ""),
    (imports_are_written_out, "zoo/catalog/clip.py", "import importlib\nimportlib.import_module(name)"),
    (imports_are_written_out, "zoo/catalog/clip.py", "__import__(name)"),
    (imports_are_written_out, "zoo/data/__init__.py", "importlib.import_module(f'..{name}', __name__)"),
    (deepspeed_has_one_file, "zoo/training/engines/ddp.py", "import deepspeed.comm"),
    (deepspeed_has_one_file, "zoo/training/trainer.py", "def f():\n    from deepspeed import initialize"),
    (processes_meet_in_two_places, "zoo/training/trainer.py", TORCH_DISTRIBUTED),
    (processes_meet_in_two_places, "zoo/data/loader.py", "from torch import distributed"),
    (processes_meet_in_two_places, "zoo/data/loader.py", "import torch\ntorch.distributed.barrier()"),
    (nothing_unpickles, "zoo/weights/read.py", "import pickle"),
    (nothing_unpickles, "zoo/data/tar.py", "def f():\n    from pickle import loads"),
    (the_environment_is_read_at_the_rim, "zoo/models/clip.py", "import os\nos.environ.get('X')"),
    (the_environment_is_read_at_the_rim, "zoo/weights/read.py", "import os\nos.getenv('X')"),
    (the_environment_is_read_at_the_rim, "zoo/data/pairs.py", "from os import environ"),
    (nothing_branches_on_a_name, "zoo/auto_loader.py", "if model_name == 'clip': pass"),
    (nothing_branches_on_a_name, "zoo/training/trainer.py", "if 'deepspeed' in self.env_type: pass"),
    (only_commands_print, "zoo/hub.py", "def f():\n    print('downloading')"),
    (no_forbidden_arguments, "zoo/auto_loader.py", "model.load_state_dict(state, strict=False)"),
    (no_forbidden_arguments, "zoo/weights/read.py", "torch.load(path, weights_only=False)"),
    (no_forbidden_arguments, "zoo/data/pairs.py", "np.load(path, allow_pickle=True)"),
    (no_forbidden_arguments, "examples/train_clip.py", "subprocess.run('ls', shell=True)"),
    (no_bare_except, "zoo/hub.py", "try:\n    pass\nexcept:\n    pass"),
    (files_are_short, "zoo/hub.py", "\n" * (LONGEST_FILE + 1)),
    (functions_are_short, "zoo/hub.py", "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION),
    (functions_are_short, "zoo/hub.py", "class A:\n  async def f():\n" + "    x = 1\n" * LONGEST_FUNCTION),
    (files_are_named_for_what_they_hold, "zoo/data/utils.py", ""),
    (files_are_named_for_what_they_hold, "zoo/helpers/text.py", ""),
    (files_are_named_for_what_they_hold, "tests/clip_utils.py", ""),
    (one_number_has_one_owner, "deepspeed_configs/zero2.json", '{"train_batch_size": 8}'),
    (one_number_has_one_owner, "deepspeed_configs/zero2.json", '{"bf16": {"enabled": true}}'),
]
ALLOWED = [
    (
        rooms_import_by_the_table,
        "zoo/models/clip.py",
        "from zoo.blocks import transformer\nfrom zoo.errors import ZooError",
    ),
    (rooms_import_by_the_table, "zoo/training/trainer.py", "from .engines import build_engine\nimport torch.optim"),
    (rooms_import_by_the_table, "zoo/catalog/clip.py", "from zoo import hub, models\nfrom zoo import __version__"),
    (rooms_import_by_the_table, "zoo/cli.py", "from zoo import AutoLoader\nfrom zoo.training import Trainer"),
    (rooms_import_by_the_table, "tests/test_cli.py", "from zoo.training import Trainer"),
    (imports_are_written_out, "zoo/training/log.py", "importlib.import_module('tensorboard')"),
    (imports_are_written_out, "zoo/data/__init__.py", "importlib.import_module(f'.{name}', __name__)"),
    (deepspeed_has_one_file, DEEPSPEED_FILE, "import deepspeed"),
    (processes_meet_in_two_places, "zoo/training/engines/ddp.py", TORCH_DISTRIBUTED),
    (processes_meet_in_two_places, "zoo/models/clip.py", "from zoo import distributed\ndistributed.gather(x)"),
    (nothing_unpickles, "zoo/weights/safe_pickle.py", "import pickletools"),
    (the_environment_is_read_at_the_rim, "zoo/hub/__init__.py", "import os\nos.environ['ZOO_HOME']"),
    (nothing_branches_on_a_name, "zoo/training/engines/__init__.py", "if env_type == 'deepspeed': pass"),
    (nothing_branches_on_a_name, "zoo/auto_loader.py", "if model_name not in names or model_name is None: pass"),
    (only_commands_print, "zoo/cli.py", "print('name')"),
    (only_commands_print, "zoo/commands/match.py", "print('name')"),
    (no_forbidden_arguments, "zoo/weights/load.py", "model.load_state_dict(state, strict=True, assign=True)"),
    (no_bare_except, "zoo/hub.py", "try:\n    pass\nexcept OSError:\n    pass"),
    (files_are_short, "zoo/hub.py", "\n" * LONGEST_FILE),
    (functions_are_short, "zoo/hub.py", "def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)),
    (files_are_named_for_what_they_hold, "zoo/weights/read.py", ""),
    (one_number_has_one_owner, "deepspeed_configs/zero2.json", '{"zero_optimization": {"stage": 2}}'),
    (one_number_has_one_owner, "deepspeed_configs/zero2.json", '{"bf16": {"bf16_optimizer_states": true}}'),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_a_planted_fault_is_caught(rule: Callable[[str, str], list[str]], path: str, source: str):
    assert len(rule(path, source)) == 1


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_what_is_allowed_passes(rule: Callable[[str, str], list[str]], path: str, source: str):
    assert rule(path, source) == []


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


@pytest.mark.parametrize(
    ("files", "rings"),
    [
        ({"zoo/a.py": "import zoo.b", "zoo/b.py": "from zoo import a"}, ["zoo.a -> zoo.b -> zoo.a"]),
        ({"zoo/a/__init__.py": "from .b import x", "zoo/a/b.py": "from . import y"}, ["zoo.a -> zoo.a.b -> zoo.a"]),
        ({"zoo/a/__init__.py": "from .b import x", "zoo/a/b.py": "from . import c", "zoo/a/c.py": ""}, []),
        ({"zoo/a.py": "import zoo.b", "zoo/b.py": "def f():\n    import zoo.a"}, []),
        ({"zoo/a.py": "import zoo.b", "zoo/b.py": "if TYPE_CHECKING:\n    import zoo.a"}, []),
        ({"zoo/a.py": "import zoo.b", "zoo/b.py": "class B:\n    import zoo.a"}, ["zoo.a -> zoo.b -> zoo.a"]),
    ],
)
def test_a_planted_cycle_is_found(files: dict[str, str], rings: list[str]):
    assert cycles(files) == rings


def test_torch_is_seen_where_it_is_imported():
    assert heavy_after("torch") == ["torch"]


def test_a_table_that_differs_is_seen():
    rows = ["| room | may import |", "|---|---|", "| `a`, `b` | nothing |", "| `c` | `a`, `b` |", "| `d` | anything |"]
    text = "\n".join(["## Who may import whom", "", *rows, "## Words", "| `e` | `a` |", ""])
    assert table_in(text) == {"a": set(), "b": set(), "c": {"a", "b"}, "d": ANY}
