"""Pickles of torch.save, read without running anything of theirs and with bounded work.

The opcodes come from `pickletools`, and each costs constant work: a dictionary key is a number, None or a short text,
nothing is hashed, compared or copied as deep as it is nested, and an object of a class that is no part of weights is
a `Foreign` stand-in.
"""

import io
import math
import pickletools
from typing import Any, NamedTuple

from mvar_jax.convert.tensors import STORAGES, Foreign, Storage, Tensor, View

MAX_WORK = 1_000_000  # opcodes; some 25,000 tensors
MAX_ARGUMENTS = 16
MAX_KEY_CHARACTERS = 1000
MAX_AXES = 32
MAX_INTEGER = 2**63

DICTS = ("collections.OrderedDict", "collections.defaultdict")
# modules whose functions run programs or change files: no weights need them, so such a file is an attack
RUNNING_MODULES = {
    *("os", "posix", "nt", "subprocess", "commands", "sys", "pty", "runpy", "importlib", "ctypes", "shutil"),
    "socket",
}
RUNNING_BUILTINS = {"eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint", "apply"}


class Global(NamedTuple):
    """A class or function that a pickle refers to, by name."""

    name: str


class PickleError(ValueError):
    """The reason why a pickle is not read."""


def load_pickle(file: io.BytesIO) -> tuple[Any, list[Storage]]:
    """Read the pickle that begins at the file's position, and leave the position behind it.

    Returns (its object, of plain values, lists, dicts, Tensors and Foreigns; the storages that it names). Raises
    PickleError if the pickle is damaged, needs too much work, or refers to what runs programs.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.spend(1)
            if opcode.name in _PUSHED:
                machine.stack.append(argument)
            elif opcode.name not in _IGNORED:
                _ACTIONS[opcode.name](machine, argument)
        return machine.stack.pop(), machine.storages
    except PickleError:
        raise
    except Exception as error:  # a damaged pickle can raise any error
        raise PickleError(f"its pickle is damaged ({type(error).__name__})") from None


_MARK = object()
_TAILS = ((), (None,))  # of a storage's persistent id; the older format adds what views have
_IGNORED = {"PROTO", "FRAME", "STOP"}
_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Storage] = []
        self.work = 0

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > MAX_WORK:
            raise PickleError(f"its pickle takes more than {MAX_WORK} steps")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, num: int) -> list[Any]:
        values = [self.stack.pop() for _ in range(num)]
        return values[::-1]

    def pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Foreign):
            raise PickleError("its pickle appends to what is no list")

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise PickleError("its pickle sets items of what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_as_key(key)] = value

    def push_dict(self, values: list[Any]) -> None:
        self.push({})
        self.update(values)

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise PickleError("its pickle names a class by something else than text")
        full, top = f"{module}.{name}", module.split(".")[0]
        is_running = top in RUNNING_MODULES or (
            top in ("builtins", "__builtin__", "io", "_io") and name.split(".")[0] in RUNNING_BUILTINS
        )
        if is_running:
            raise PickleError(f"it calls {full[:100]!a}, which no weights need; no code was run, and do not load it")
        self.push(Global(full))

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise PickleError("its pickle calls what is no function")
        if function.name in _REBUILDERS:
            self.push(_REBUILDERS[function.name](*arguments[:MAX_ARGUMENTS]))
        elif function.name in DICTS:
            # Python 2 gave the items of an OrderedDict as a list of pairs
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            self.spend(len(pairs))
            self.push_dict([part for pair in pairs for part in _as_pair(pair)])
        else:
            made = arguments[0] if arguments and isinstance(arguments[0], Global) else function
            self.push(Foreign(made.name))

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, Foreign):
            state = state[0] if isinstance(state, tuple) and state else state  # with __slots__: (attributes, slots)
            target.attributes = state if isinstance(state, dict) else {}
        elif type(target) not in (dict, Tensor):  # of a state dict: torch's `_metadata`, which is not needed
            raise PickleError("its pickle sets attributes of what has none")

    def push_persistent(self, pid: Any) -> None:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":  # a class with its source, in old files
            self.push(pid[1])
            return
        is_storage = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and pid[5:] in _TAILS
        if not is_storage or type(pid[1]) is not Global or type(pid[2]) is not str or not _is_size(pid[4]):
            raise PickleError("a storage has an unknown form")
        storage = Storage(pid[2], pid[1].name, pid[4])
        self.storages.append(storage)
        self.push(storage)

    def instantiate(self, values: list[Any]) -> None:
        self.call(values[0], tuple(values[1:]))


def _as_key(key: Any) -> Any:
    """Return a key that is hashed and compared in constant time: the key itself, or an unequal stand-in."""
    is_plain = key is None or type(key) is bool or (type(key) is int and abs(key) < MAX_INTEGER)
    is_plain |= type(key) is str and len(key) <= MAX_KEY_CHARACTERS
    return key if is_plain else Foreign(type(key).__name__)


def _as_pair(pair: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise PickleError("its pickle has a dictionary of what are no pairs")
    return pair


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < MAX_INTEGER


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor | Foreign:
    if not (
        isinstance(storage, Storage)
        and type(shape) is tuple
        and type(strides) is tuple
        and len(shape) == len(strides) <= MAX_AXES
        and all(map(_is_size, (offset, *shape, *strides)))
    ):
        raise PickleError("a tensor has no valid storage, shape or strides")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.num_elements:
        raise PickleError(f"a tensor of shape {shape} exceeds its storage of {storage.num_elements} elements")
    dtype = STORAGES.get(storage.kind, (None, 0))[0]
    return Foreign(storage.kind) if dtype is None else Tensor(shape, dtype, View(storage, offset, strides))


def _rebuild_parameter(data: Any, *_: Any) -> Tensor | Foreign:
    if not isinstance(data, Tensor | Foreign):
        raise PickleError("a parameter has no tensor")
    return data


def _rebuild_subclass(function: Any, _: Any, arguments: Any, *__: Any) -> Tensor | Foreign:
    """Return a tensor that has attributes, without them."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple) or function.name not in _TENSORS:
        return Foreign("torch._tensor._rebuild_from_type_v2")
    return _rebuild_tensor(*arguments[:MAX_ARGUMENTS])


_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_REBUILDERS = {
    **dict.fromkeys(_TENSORS, _rebuild_tensor),
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
}


def _refuse(machine: _Machine, _: Any) -> None:
    raise PickleError("its pickle refers to objects outside the file")


_ACTIONS = {
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push(Foreign("set")),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop(3))),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "LIST": lambda m, _: m.push(m.pop_to_mark()),
    "DICT": lambda m, _: m.push_dict(m.pop_to_mark()),
    "FROZENSET": lambda m, _: (m.pop_to_mark(), m.push(Foreign("frozenset"))),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.update(m.pop(2)),
    "SETITEMS": lambda m, _: m.update(m.pop_to_mark()),
    "MARK": lambda m, _: m.push(_MARK),
    "POP": lambda m, _: m.pop(1),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, index: m.memo.update({index: m.stack[-1]})),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "GLOBAL": lambda m, names: m.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.push_global(*m.pop(2)),
    "INST": lambda m, names: (m.push_global(*names.split(" ", 1)), m.call(m.stack.pop(), tuple(m.pop_to_mark()))),
    "OBJ": lambda m, _: m.instantiate(m.pop_to_mark()),
    "REDUCE": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ_EX": lambda m, _: m.call(*m.pop(3)[:2]),
    "BUILD": lambda m, _: m.build(m.stack.pop()),
    "BINPERSID": lambda m, _: m.push_persistent(m.stack.pop()),
    **dict.fromkeys(("PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"), _refuse),
}
