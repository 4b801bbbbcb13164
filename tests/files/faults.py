"""Faults of processes and disks, at each operation on files: helpers of tests of several rooms."""

import builtins
import errno
import fcntl
import io
import os
import signal
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from unittest import mock

CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
_CALLS = (
    *("open", "fsync", "write", "replace", "rename", "link", "unlink"),
    *("mkdir", "rmdir", "listdir", "scandir"),
)
_FILE_CALLS = ("read", "readinto", "write", "flush")


def contents(folder):
    """Bytes of each file and None for each folder, by path as seen from the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class Operations(ExitStack):
    """Calls `happens(name, call)` in place of each operation on files in its block."""

    def __init__(self, happens):
        super().__init__()
        self.happens = happens

    def __enter__(self):
        for module, name in (*((os, name) for name in _CALLS), (fcntl, "flock")):
            label = f"os.{name}" if name in ("open", "write") else name
            self._replace(module, name, partial(self._call, label, getattr(module, name)))
        for module in (builtins, io):
            self._replace(module, "open", partial(self._open, builtins.open))
        return super().__enter__()

    def _replace(self, module, name, call):
        self.enter_context(mock.patch.object(module, name, call))

    def _call(self, name, function, *arguments, **options):
        return self.happens(name, partial(function, *arguments, **options))

    def _open(self, function, path, mode="r", *arguments, **options):
        file = self._call(f"open {mode}", function, path, mode, *arguments, **options)
        return _File(file, self._call)


class _File:
    """An open file whose reads and writes are operations."""

    def __init__(self, file, call):
        self.file, self.call = file, call

    def __getattr__(self, name):
        function = getattr(self.file, name)
        return partial(self.call, name, function) if name in _FILE_CALLS else function

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


class Strike:
    """Lets the n-th operation go wrong, once.

    Attributes:
        name: Of the operation that went wrong; None if there were fewer.
    """

    def __init__(self, number, wrong):
        self.left, self.wrong, self.name = number, wrong, None

    def __call__(self, name, call):
        self.left -= 1
        if self.left:
            return call()
        self.name = name
        if name in ("write", "os.write") and self.wrong is not kill_after:
            # half of it arrives
            *before, data = call.args
            call.func(*before, data[: len(data) // 2])
        return self.wrong(call)


def each_error(make, work, code):
    """Lets each operation of `work(folder)` fail, one in each turn, until there is none left.

    Args:
        make: Returns a folder, prepared in the same way each time.
        work: Operates on files in it.
        code: Of the OSError.

    Yields:
        The folder, the name of the operation, and what `work` raised, or None.
    """

    def fail(call):
        raise OSError(code, os.strerror(code))

    for number in count(1):
        folder, strike, raised = make(), Strike(number, fail), None
        try:
            with Operations(strike):
                work(folder)
        except OSError as error:
            raised = error
        if strike.name is None:
            assert raised is None
            return
        assert raised is None or (raised.errno == code and os.strerror(code) in str(raised))
        yield folder, strike.name, raised


# Processes that are killed


def kill_before(call):
    """Kills the process in place of an operation."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(call):
    """Kills the process when an operation is done."""
    try:
        call()
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def each_kill(make, work, wrong):
    """Kills a process at each operation of `work(folder, acknowledge)`, one in each turn.

    Args:
        make: As for `each_error`.
        work: Operates on files in it, and may call `acknowledge` with numbers below 256.
        wrong: `kill_before` or `kill_after`.

    Yields:
        The folder and the numbers that were acknowledged.
    """
    for number in count(1):
        folder = make()
        acknowledged, killed = _work_in_child(folder, work, Strike(number, wrong))
        if not killed:
            return
        yield folder, acknowledged


def _work_in_child(folder, work, strike):
    reader, writer = os.pipe()
    write, code = os.write, 1
    child = os.fork()
    if not child:
        with suppress(BaseException):
            with Operations(strike):
                work(folder, lambda number: write(writer, bytes([number])))
            code = 0
        os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    with open(reader, "rb") as pipe:
        return [*pipe.read()], status == signal.SIGKILL


# Power that is lost


class _Folder:
    """Names on a disk, and changes to them that may be lost, each whole."""

    def __init__(self):
        self.names, self.changes = {}, []

    def newest(self):
        return self.left(lambda states: states[-1])

    def left(self, choose):
        names = dict(self.names)
        for change in self.changes:
            if choose([False, True]):
                names |= change
        return {name: what for name, what in names.items() if what is not None}

    def copy(self):
        other = _Folder()
        other.names, other.changes = dict(self.names), [*self.changes]
        return other


class Disk:
    """What is on a disk, and what of it would still be there without power.

    Contents of files and names in folders are kept apart: each lasts once it was synced, and until
    then any of its states since may be found. What is there from the beginning lasts.

    Args:
        root: A folder; nothing outside of it counts.
        sync_files: Whether files obey fsync.
        sync_folders: Whether folders do.

    Attributes:
        states: After each change, for `left_without_power`.
    """

    def __init__(self, root, *, sync_files=True, sync_folders=True):
        self.root, self.sync_files, self.sync_folders = root, sync_files, sync_folders
        self.nodes = []
        """Of a file the list of bytes that it may hold; of a folder a `_Folder`."""
        self.handles = {}
        """Numbers of nodes by numbers of open files."""
        self.acknowledged, self.states = [], []
        self._take(root)
        self._remember()

    def happens(self, name, call):
        """Does an operation, for `Operations`."""
        result = call()
        change = getattr(self, "_" + name.split()[0].replace(".", "_"), None)
        if change is not None and change(result, call) is not False:
            self._remember()
        return result

    def acknowledge(self, number):
        """Remembers a number with the states from now on."""
        self.acknowledged.append(number)
        self._remember()

    def _take(self, path):
        number = self._new(_Folder() if path.is_dir() else [path.read_bytes()])
        if path.is_dir():
            for inner in path.iterdir():
                self.nodes[number].names[inner.name] = self._take(inner)
        return number

    def _new(self, node):
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _remember(self):
        nodes = [node.copy() if isinstance(node, _Folder) else [*node] for node in self.nodes]
        self.states.append((nodes, [*self.acknowledged]))

    def _place(self, path, folder=None):
        """The node of the folder that holds a path, and the name in it; None elsewhere."""
        if folder is not None:
            return self.handles.get(folder), path
        path = os.path.abspath(path)
        if not path.startswith(f"{self.root}{os.sep}"):
            return None, ""
        *parts, name = os.path.relpath(path, self.root).split(os.sep)
        number = 0
        for part in parts:
            number = self.nodes[number].newest()[part]
        return number, name

    def _find(self, path, folder=None):
        if folder is None and os.path.abspath(path) == str(self.root):
            return 0
        holder, name = self._place(path, folder)
        return None if holder is None else self.nodes[holder].newest().get(name)

    def _change(self, *changes):
        """Gives names other meanings, at once where they are in one folder."""
        by_folder = {}
        for (holder, name), what in changes:
            if holder is not None:
                by_folder.setdefault(holder, {})[name] = what
        for holder, change in by_folder.items():
            self.nodes[holder].changes.append(change)

    def _open(self, file, call):
        path, mode = call.args[:2]
        return self._opened(file.fileno(), path, None, new=mode in ("xb", "wb"))

    def _os_open(self, descriptor, call):
        folder = call.keywords.get("dir_fd")
        new = bool(call.args[1] & os.O_CREAT) and self._find(call.args[0], folder) is None
        return self._opened(descriptor, call.args[0], folder, new=new)

    def _opened(self, descriptor, path, folder, *, new):
        if isinstance(path, int):
            return False
        if new and self._place(path, folder)[0] is not None:
            self._change((self._place(path, folder), self._new([b""])))
        self.handles[descriptor] = self._find(path, folder)
        return new

    def _mkdir(self, _, call):
        self._change((self._place(call.args[0]), self._new(_Folder())))

    def _write(self, _, call):
        return self._written(call.func.__self__.fileno(), call.args[0])

    def _os_write(self, _, call):
        return self._written(*call.args)

    def _written(self, descriptor, data):
        number = self.handles.get(descriptor)
        if number is None:
            return False
        before, data = self.nodes[number][-1], bytes(data)
        self.nodes[number] += [
            before + bytes(len(data)),
            before + data[: len(data) // 2],
            before + data,
        ]
        return True

    def _fsync(self, _, call):
        number = self.handles.get(call.args[0])
        node = None if number is None else self.nodes[number]
        if isinstance(node, list) and self.sync_files:
            del node[:-1]
        elif isinstance(node, _Folder) and self.sync_folders:
            node.names, node.changes = node.newest(), []

    def _replace(self, _, call):
        source, target = call.args
        self._change((self._place(source), None), (self._place(target), self._find(source)))

    _rename = _replace

    def _link(self, _, call):
        self._change((self._place(call.args[1]), self._find(call.args[0])))

    def _unlink(self, _, call):
        self._change((self._place(call.args[0], call.keywords.get("dir_fd")), None))

    _rmdir = _unlink


def left_without_power(state, choose, target):
    """Builds what a disk holds; returns the numbers that were acknowledged before.

    Args:
        state: Of a `Disk`.
        choose: Takes one of a list of states, the oldest first.
        target: A folder to be made.
    """
    nodes, acknowledged = state
    found = [choose(node) if isinstance(node, list) else None for node in nodes]

    def build(number, path):
        path.mkdir()
        for name, inner in nodes[number].left(choose).items():
            if found[inner] is None:
                build(inner, path / name)
            else:
                (path / name).write_bytes(found[inner])

    build(0, target)
    return acknowledged


def oldest(states):
    return states[0]


def newest(states):
    return states[-1]


def oldest_content_with_newest_names(states):
    return states[0] if isinstance(states[0], bytes) else states[-1]


CHOICES = (oldest, newest, oldest_content_with_newest_names)
