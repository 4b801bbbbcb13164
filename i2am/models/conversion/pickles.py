"""Pickles of torch read as descriptions of tensors: nothing that they name is imported or called.

A pickle is a program for a machine with a stack. The machine here knows tensors, storages, numbers,
text, tuples, lists and dictionaries. Whatever else a pickle makes is a `Thing` that keeps nothing.
"""

import io
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MOST_INSTRUCTIONS = 2_000_000
"""Of one pickle; Stable Diffusion with averaged weights and its optimizer takes 300 thousand."""
_LONGEST_NAME, _MOST_ARGUMENTS = 1000, 16

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
"""Dtype of the elements, by the name that torch gives their storage."""

# what a file names only to run something; the others are left out because they are not needed,
# so no harm is done by a name that this list lacks
_ATTACKS = re.compile(
    r"(subprocess|commands|pty|runpy|socket|webbrowser)\..*"
    r"|(os|posix|nt)\.(system|popen|startfile|fork|kill|remove|unlink|(exec|spawn|posix_spawn)\w*)"
    r"|shutil\.(rmtree|move|copy\w*|unpack_archive)"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|__import__)"
)
_TENSOR, _PARAMETER = "torch.Tensor", "torch.nn.parameter.Parameter"
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Attack(Exception):
    """A pickle names a function that runs commands or code; the message is the name."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names, such as collections.OrderedDict."""

    full: str


@dataclass(frozen=True, eq=False, slots=True)
class Thing:
    """Stands for an object of another class, or what a function of that name would return."""

    full: str


@dataclass(frozen=True)
class Storage:
    """A row of elements in the file.

    Args:
        key: Its name in the file.
        dtype: Of its elements.
        begin: Which of the elements under that name is the first.
        count: How many elements it has.
    """

    key: str
    dtype: torch.dtype
    begin: int
    count: int


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """What a file says about a tensor; it may reach beyond its storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """What one pickle describes.

    Args:
        stream: Begins with it; is left behind it.

    Returns:
        The content, and all storages that it names, by key.

    Raises:
        Attack: It names a function that is known to run commands or code.
        Exception: It is damaged, or has more than `MOST_INSTRUCTIONS`.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(stream):
        machine.work(1)
        machine.run(opcode, argument)
    return machine.stack[-1], machine.storages


def kind_of(value: Any) -> str:
    """What a value of `read_pickle` is, for an error."""
    if isinstance(value, Mapping) and not value:
        return "nothing"
    if isinstance(value, TensorRecord):
        return "a tensor"
    if isinstance(value, Thing):
        return f"an object of {value.full}"
    if isinstance(value, Name):
        return f"the name {value.full}"
    return f"a {type(value).__name__}"


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._instructions = 0

    def work(self, amount: int) -> None:
        self._instructions += amount
        if self._instructions > MOST_INSTRUCTIONS:
            raise ValueError(f"a pickle has more than {MOST_INSTRUCTIONS} instructions")

    def run(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        stack, pop = self.stack, self.stack.pop
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "MARK":
                self._marks.append(len(stack))
            case "POP_MARK":
                self._behind_mark()
            case "POP" if self._marks and self._marks[-1] == len(stack):
                self._marks.pop()
            case "POP":
                pop()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if argument >= 1 << 32:
                    raise ValueError("a number of the memo is too large")
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(Thing("builtins.set"))
            case name if name in _TUPLES:
                last = tuple(stack[-_TUPLES[name] :])
                if len(last) < _TUPLES[name]:
                    raise ValueError("a tuple lacks items")
                stack[-len(last) :] = [last]
            case "TUPLE":
                stack.append(tuple(self._behind_mark()))
            case "LIST":
                stack.append(self._behind_mark())
            case "DICT":
                items = self._behind_mark()
                stack.append({})
                self._fill(items)
            case "FROZENSET":
                self._behind_mark()
                stack.append(Thing("builtins.frozenset"))
            case "APPEND":
                self._fill([pop()])
            case "SETITEM":
                self._fill([pop(), pop()][::-1])
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                self._fill(self._behind_mark())
            case "BUILD":
                pop()  # attributes
            case "GLOBAL":
                stack.append(_named(*argument.rsplit(" ", 1)))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                stack.append(_named(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = pop(), pop()
                stack.append(self._called(function, arguments))
            case "NEWOBJ_EX":
                _options, arguments, function = pop(), pop(), pop()
                stack.append(self._called(function, arguments))
            case "OBJ":
                function, *rest = self._behind_mark()
                stack.append(self._called(function, tuple(rest)))
            case "INST":
                rest = self._behind_mark()
                stack.append(self._called(_named(*argument.rsplit(" ", 1)), tuple(rest)))
            case "PERSID":
                stack.append(Thing("a persistent object"))
            case "BINPERSID":
                stack.append(self._persistent(pop()))
            # numbers and text
            case name if opcode.arg is not None and not name.startswith("EXT"):
                stack.append(argument)
            case name:
                raise ValueError(f"a pickle has the instruction {name}")

    def _behind_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _fill(self, items: list[Any]) -> None:
        """Puts items into the list or dictionary on the stack; other things keep nothing."""
        container = self.stack[-1]
        if isinstance(container, list):
            container.extend(items)
        elif isinstance(container, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                # other keys are not hashed: that may take for ever, or all of C's stack
                container[key if isinstance(key, str) else Thing(type(key).__name__)] = value

    def _called(self, function: Any, arguments: Any) -> Any:
        """What a function returns, or an object of a class."""
        if not isinstance(function, Name | Thing):
            raise ValueError(f"a pickle calls {kind_of(function)}")
        if isinstance(arguments, tuple) and len(arguments) <= _MOST_ARGUMENTS:
            if function.full in _REBUILD:
                return _REBUILD[function.full](*arguments)
            if function.full in _DICTIONARIES:
                return self._dictionary(arguments)
        return Thing(function.full)

    def _dictionary(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """Empty, as it is filled later; Python 2 gave it a list of pairs."""
        self.stack.append({})
        for pairs in arguments:
            if isinstance(pairs, list):
                self.work(len(pairs))
                for key, value in pairs:
                    self._fill([key, value])
        return self.stack.pop()

    def _persistent(self, pid: Any) -> Any:
        """Storages are named by what torch calls persistent ids, and modules were before 1.6."""
        if pid[0] != "storage":
            return Thing("a persistent object")
        _, dtype, key, _, count, *view = pid[:6]
        whole = _storage(key, dtype, 0, count)
        if self.storages.setdefault(whole.key, whole) != whole:
            raise ValueError(f"storage {whole.key} is described in two ways")
        if any(view):
            _, begin, count = view[0]
            return _storage(key, dtype, begin, count)
        return whole


def _named(module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a name is not text")
    if len(module) + len(name) > _LONGEST_NAME:
        raise ValueError(f"a name is longer than {_LONGEST_NAME} characters")
    full = f"{module}.{name}"
    if _ATTACKS.fullmatch(full):
        raise Attack(full)
    if module in ("torch", "torch.cuda", "torch.storage") and name in _DTYPES:
        return _DTYPES[name]
    # not getattr, for which torch imports modules
    if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
        return vars(torch)[name]
    return Name(full)


def _storage(key: Any, dtype: Any, begin: Any, count: Any) -> Storage:
    if not (isinstance(key, str) and isinstance(dtype, torch.dtype)):
        raise ValueError("a storage has no name or no dtype")
    if not (_is_size(begin) and _is_size(count)):
        raise ValueError(f"storage {key[:100]} has no size")
    return Storage(key, dtype, begin, count)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 63


# torch's functions that rebuild tensors; the last arguments are whether gradients are wanted,
# hooks, and marks of tensors whose values are not what is stored


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None
) -> TensorRecord | Thing:
    if any(rest[2:]):
        return Thing("a conjugated or negated tensor")
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor has {kind_of(storage)} in place of a storage")
    dtype = dtype or storage.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor has {kind_of(dtype)} in place of a dtype")
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)):
        raise ValueError("the size of a tensor does not fit its stride")
    if not all(type(number) is int for number in (offset, *size, *stride)):
        raise ValueError("a tensor's place in its storage is no number")
    return TensorRecord(storage, dtype, offset, size, stride)


def _tensor_with_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorRecord | Thing:
    return _tensor(storage, offset, size, stride, grad, hooks, *rest, dtype=dtype)


def _parameter(tensor: Any, *_rest: Any) -> Any:
    return tensor


def _tensor_with_attributes(rebuild: Any, kind: Any, arguments: Any, *_rest: Any) -> Any:
    plain = isinstance(kind, Name) and kind.full in (_TENSOR, _PARAMETER)
    if not plain or not isinstance(rebuild, Name) or rebuild.full not in _REBUILD:
        return Thing(kind.full if isinstance(kind, Name) else "a class of tensors")
    return _REBUILD[rebuild.full](*arguments)


_REBUILD: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    _PARAMETER: _parameter,
}
