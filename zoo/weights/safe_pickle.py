"""The only unpickling there is: the opcodes of a pickle are read as data, and nothing they name is imported or called.

Python's own unpickler is not used, since its memo, its hashing of keys and its calls can each be turned against the
reader. `pickletools.genops` decodes the opcodes, and the small stack machine below keeps plain values and the records
of `pickle_records`. Source: the opcode descriptions in CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from zoo.errors import UnreadableWeights, UnsafePickle
from zoo.weights.pickle_records import (
    ALLOWED,
    INERT,
    MAX_NAME,
    Global,
    Object,
    StorageRef,
    TensorRef,
    as_dict,
    persistent,
)

MAX_OPCODES = 10_000_000  # a checkpoint needs about forty for each tensor
MAX_VALUES = 1_000_000  # that named_tensors looks at


class _Machine:
    """The stack, its marks and its memo."""

    def __init__(self, storages: dict[str, StorageRef] | None = None) -> None:
        self.storages = {} if storages is None else storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.work = 0

    def pop(self, count: int) -> tuple:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return values

    def pop_mark(self) -> list:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def keep(self, index: int | None = None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def set_items(self, flat: list | tuple) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Object) else target
        if not isinstance(target, dict):
            raise TypeError("items for something that has none")
        target.update(_pairs(flat))

    def extend(self, values: list | tuple) -> None:
        target = self.stack[-1]
        if isinstance(target, Object):
            target.items.update(enumerate(values, start=len(target.items)))
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise TypeError("elements for something that has none")

    def call(self, function: Any, args: Any) -> Any:
        """What the opcode REDUCE asks for, where that is on the allow-list."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise TypeError("a call of something that is no function")
        if function.name == "torch._tensor._rebuild_from_type_v2":  # a tensor with Python attributes
            return self.call(args[0], args[2])
        if function.name in INERT:
            return Object(function.name, args=args)
        if function.name not in ALLOWED:
            raise UnsafePickle(f"the pickle asks to call {function.name!r}, which tensors do not need")
        self.work += sum(len(arg) for arg in args if isinstance(arg, (list, tuple)))  # each call may copy these
        if self.work > MAX_OPCODES:
            raise UnreadableWeights("the pickle makes more of itself than any checkpoint does")
        return ALLOWED[function.name](*args)

    def new(self, cls: Any) -> Any:
        """An instance, without a call of its constructor."""
        if not isinstance(cls, Global):
            raise TypeError("an instance of something that is no class")
        return {} if cls.name == "collections.OrderedDict" else Object(cls.name)

    def instance(self, cls: Any, args: list) -> Any:
        """What the opcodes INST and OBJ ask for: they call the class when there are arguments."""
        return self.call(cls, tuple(args)) if args else self.new(cls)

    def object(self) -> Any:
        cls, *args = self.pop_mark()
        return self.instance(cls, args)

    def stack_global(self) -> Global:
        module, name = self.pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        return Global(f"{module[:2000]}.{name[:2000]}")

    def storage(self, identity: Any) -> Any:
        found = persistent(identity)
        if isinstance(found, StorageRef):
            self.storages.setdefault(found.key, found)
        return found

    def build(self, state: Any) -> None:
        if isinstance(self.stack[-1], Object):  # on a dict it is the metadata of a state dict: no tensors
            self.stack[-1].state = state


def _pairs(flat: list | tuple) -> dict:
    return as_dict(zip(flat[::2], flat[1::2], strict=True))


def _global(text: str) -> Global:
    return Global(text.replace(" ", ".", 1))


_PUSHED = frozenset(  # opcodes whose argument is the value
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_PUSHES: dict[str, Callable[[_Machine, Any], Any]] = {  # opcodes that leave one value
    "NONE": lambda m, _: None,
    "NEWTRUE": lambda m, _: True,
    "NEWFALSE": lambda m, _: False,
    "EMPTY_DICT": lambda m, _: {},
    "EMPTY_LIST": lambda m, _: [],
    "EMPTY_SET": lambda m, _: [],
    "EMPTY_TUPLE": lambda m, _: (),
    "DICT": lambda m, _: _pairs(m.pop_mark()),
    "LIST": lambda m, _: m.pop_mark(),
    "FROZENSET": lambda m, _: m.pop_mark(),
    "TUPLE": lambda m, _: tuple(m.pop_mark()),
    "TUPLE1": lambda m, _: m.pop(1),
    "TUPLE2": lambda m, _: m.pop(2),
    "TUPLE3": lambda m, _: m.pop(3),
    "DUP": lambda m, _: m.stack[-1],
    "GET": lambda m, index: m.memo[index],
    "BINGET": lambda m, index: m.memo[index],
    "LONG_BINGET": lambda m, index: m.memo[index],
    "GLOBAL": lambda m, text: _global(text),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "REDUCE": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ": lambda m, _: m.new(m.pop(2)[0]),
    "NEWOBJ_EX": lambda m, _: m.new(m.pop(3)[0]),
    "INST": lambda m, text: m.instance(_global(text), m.pop_mark()),
    "OBJ": lambda m, _: m.object(),
    "BINPERSID": lambda m, _: m.storage(*m.pop(1)),
}
_ACTS: dict[str, Callable[[_Machine, Any], Any]] = {  # opcodes that change what is there
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "STOP": lambda m, _: None,
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(1),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "PUT": _Machine.keep,
    "BINPUT": _Machine.keep,
    "LONG_BINPUT": _Machine.keep,
    "MEMOIZE": _Machine.keep,
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "BUILD": lambda m, _: m.build(*m.pop(1)),
}


def unpickle(stream: BinaryIO, storages: dict[str, StorageRef] | None = None) -> Any:
    """The next pickle of `stream` -> plain values and records. The stream is left behind the pickle's end.

    `storages`, where given, receives every storage that the pickle refers to, by key.
    Raises UnsafePickle where the pickle asks for more than tensors, UnreadableWeights where it is damaged.
    """
    machine = _Machine(storages)
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise UnreadableWeights("the pickle is far longer than that of any checkpoint")
            if opcode.name in _PUSHED:
                machine.stack.append(arg)
            elif opcode.name in _PUSHES:
                machine.stack.append(_PUSHES[opcode.name](machine, arg))
            elif opcode.name in _ACTS:
                _ACTS[opcode.name](machine, arg)
            else:
                raise UnsafePickle(f"the pickle uses the opcode {opcode.name}, which tensors do not need")
        return machine.stack.pop()
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, MemoryError) as error:
        raise UnreadableWeights(f"the pickle is damaged: {error}") from error


def named_tensors(tree: Any) -> dict[str, TensorRef]:
    """What `unpickle` gave -> the tensors in it, by dotted name; see `named`."""
    return named(tree, lambda value: isinstance(value, TensorRef))


def named(tree: Any, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """What `unpickle` gave -> those values in it that `is_tensor` picks, by dotted name.

    Dicts give their keys, lists their numbers, TorchScript objects their attributes, and pickled modules what their
    state dict would. Everything else is dropped. Raises UnreadableWeights where two tensors have one name.
    """
    found: dict[str, Any] = {}
    waiting = [("", tree)]
    values = 0
    while waiting:
        name, value = waiting.pop()
        if is_tensor(value):
            if name in found:
                raise UnreadableWeights(f"two tensors are called {name!r}")
            found[name] = value
            continue
        children = _children(value)
        values += len(children)
        if values > MAX_VALUES or len(name) > MAX_NAME:  # which also ends what holds itself
            raise UnreadableWeights("values nested deeper, longer or wider than in any checkpoint")
        prefix = f"{name}." if name else ""
        inner = [(f"{prefix}{_text(key)}", child) for key, child in children if isinstance(child, _HOLDERS)]
        waiting.extend(reversed(inner))
    if "" in found:
        raise UnreadableWeights("a tensor without a name; save it in a dict")
    return found


_HOLDERS = (TensorRef, Object, dict, list, tuple)


def _text(key: Any) -> str:
    return key.name if isinstance(key, Global) else str(key)


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if not isinstance(value, Object):
        return []
    state = value.state if isinstance(value.state, dict) else {}
    if value.name.startswith("__torch__."):
        return list(state.items())
    parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
    if all(isinstance(part, dict) for part in parts):  # torch.nn.Module
        return [pair for part in parts for pair in part.items()]
    return list(value.items.items())
