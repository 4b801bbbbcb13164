"""Pickles of torch read as descriptions of tensors: nothing that they name is imported or called.

A pickle is a program that builds objects by calling what it names. Here every name stands for a
class of this module. Those for torch's functions that rebuild tensors keep their arguments; all
others keep nothing.
"""

import pickle
import re
from dataclasses import dataclass
from typing import IO, Any

import torch

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


class Attack(Exception):
    """A pickle names a function that runs commands or code; the message is the name."""


class Placeholder:
    """Stands for an object that a pickle describes: takes all that is done to it, keeps nothing."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return super().__new__(cls)

    def _ignore(self, *args: Any, **options: Any) -> None:
        pass

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self

    # unpickling calls no other methods. With __setstate__ it sets no attributes, of classes neither
    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore


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


class TensorRecord(Placeholder):
    """What a file says about a tensor; nothing of it is checked."""

    storage: Any
    dtype: Any
    offset: Any
    size: Any
    stride: Any

    # of torch's _rebuild_tensor and _rebuild_tensor_v2: the rest is whether gradients are wanted,
    # hooks, and marks of tensors whose values are not what is stored
    def __new__(
        cls, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None
    ) -> Any:
        if any(rest[2:]):
            return Marked()
        self = super().__new__(cls)
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
        self.dtype = dtype or storage.dtype
        return self


class Marked(Placeholder):
    """A tensor whose stored values have to be conjugated or negated."""


class _TypedTensor(Placeholder):
    """torch's _rebuild_tensor_v3, for dtypes that no storage is named after."""

    def __new__(
        cls,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any,
        hooks: Any,
        dtype: Any,
        *metadata: Any,
    ) -> Any:
        return TensorRecord(storage, offset, size, stride, grad, hooks, *metadata, dtype=dtype)


class _Parameter(Placeholder):
    """torch's _rebuild_parameter, with or without attributes: the tensor itself."""

    def __new__(cls, tensor: Any, *rest: Any) -> Any:
        return tensor


class _WithAttributes(Placeholder):
    """torch's _rebuild_from_type_v2: a tensor with attributes of its own."""

    def __new__(cls, rebuild: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
        plain = kind in (_Tensor, _Parameter) and rebuild in _REBUILD.values()
        return rebuild(*arguments) if plain else super().__new__(cls)


class _Tensor(Placeholder):
    """torch.Tensor as a name; a tensor is never described by it alone."""


class _Attribute(Placeholder):
    """getattr, by which pickles ask for classes inside of classes, and for methods."""

    def __new__(cls, *args: Any) -> Any:
        return Placeholder


class _Items(dict[Any, Any]):
    """A dictionary of the collections module without what is special about it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(pairs for pairs in args if isinstance(pairs, list)))

    def __setstate__(self, *state: Any) -> None:
        pass


_REBUILD = {
    "torch._utils._rebuild_tensor": TensorRecord,
    "torch._utils._rebuild_tensor_v2": TensorRecord,
    "torch._utils._rebuild_tensor_v3": _TypedTensor,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "torch._tensor._rebuild_from_type_v2": _WithAttributes,
}
_KNOWN = _REBUILD | {
    "torch.Tensor": _Tensor,
    "torch.nn.parameter.Parameter": _Parameter,
    "collections.OrderedDict": _Items,
    "collections.defaultdict": _Items,
    "builtins.getattr": _Attribute,
    "__builtin__.getattr": _Attribute,
}


class Unpickler(pickle.Unpickler):
    """Reads one pickle.

    Args:
        stream: Begins with it.

    Attributes:
        storages: All storages that it names, by key.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        # text of Python 2 has no encoding of its own
        super().__init__(stream, encoding="utf-8", errors="replace")
        self.storages: dict[str, Storage] = {}
        self._placeholders: dict[str, type[Placeholder]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A class of this module or a dtype, in place of what the pickle names.

        Raises:
            Attack: It is known to run commands or code.
        """
        full = f"{module}.{name}"
        if _ATTACKS.fullmatch(full):
            raise Attack(full)
        if full in _KNOWN:
            return _KNOWN[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        # not getattr, for which torch imports modules
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if full not in self._placeholders:
            self._placeholders[full] = type(name, (Placeholder,), {"__module__": module})
        return self._placeholders[full]

    def persistent_load(self, pid: Any) -> Any:
        """Storages are named by what torch calls persistent ids, and modules were before 1.6."""
        if pid[0] != "storage":
            return Placeholder
        _, dtype, key, _, count, *view = pid
        whole = self.storages.setdefault(key, Storage(key, dtype, 0, count))
        if any(view):
            _, begin, count = view[0]
            return Storage(key, dtype, begin, count)
        return whole
