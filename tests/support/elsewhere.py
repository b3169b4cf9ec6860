"""A process as on Windows: `strip()` takes away what Linux alone has, and forbids what Windows forbids.

What it cannot take away: the compiled parts of other packages still run as on Linux, and so does the file system.
"""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

MISSING: dict[Any, str] = {
    os: "fork forkpty pread preadv pwrite posix_fadvise sched_getaffinity setpgid getpgid killpg setsid link symlink "
    "statvfs sysconf getuid geteuid getloadavg uname fchmod mkfifo nice wait4 register_at_fork O_DIRECTORY O_NONBLOCK",
    signal: "SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE SIGKILL SIGQUIT setitimer alarm pthread_sigmask sigwait",
}
NO_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
NO_LETTERS = set('<>:"|?*')  # in names of files
NO_FOLDERS = ("/proc", "/sys")
SIGNALS = {signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGINT, signal.SIGSEGV, signal.SIGTERM}
stat, fsync, rename, set_handler, relative_to = os.stat, os.fsync, os.rename, signal.signal, PurePath.relative_to
_asking: list[str] = []  # not empty while the hook itself opens files


class Relative(type(Path())):  # type: ignore[misc]
    r"""A relative path that is written with \ in texts."""

    def __str__(self) -> str:
        return str(PureWindowsPath(*self.parts))

    def __fspath__(self) -> str:
        return "/".join(self.parts)

    def as_posix(self) -> str:
        return "/".join(self.parts)


def strip() -> None:
    """Do it, after other packages are imported and before ours is."""
    for module, names in MISSING.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    sys.modules |= dict.fromkeys(NO_MODULES)  # type: ignore[arg-type]
    sys.platform = "win32"
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment]
    multiprocessing.set_start_method("spawn", force=True)

    os.stat, os.fsync, os.rename, os.kill = _stat, _fsync, _rename, _kill  # type: ignore[assignment]
    signal.signal = _set_handler  # type: ignore[assignment]
    PurePath.relative_to = lambda self, *other: Relative(relative_to(self, *other))  # type: ignore[assignment]
    sys.addaudithook(_watch)
    warnings.filterwarnings("ignore", category=EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module="corinfomax")


def _stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
    if str(path).startswith(NO_FOLDERS):
        raise FileNotFoundError(errno.ENOENT, "not on this system", path)
    return stat(path, *args, **kwargs)


def _fsync(handle: int) -> None:
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "a file that is open for reading cannot be synced")
    fsync(handle)


def _rename(source: Any, target: Any) -> None:
    if Path(target).exists():
        raise FileExistsError(errno.EEXIST, "the new name is taken", target)
    rename(source, target)


def _kill(process: int, number: int) -> None:
    raise AssertionError(f"os.kill({process}, {number}) ends processes on Windows, whatever the number")


def _set_handler(number: Any, handler: Any) -> Any:
    if number not in SIGNALS:
        raise ValueError(f"no signal {number} on this system")
    return set_handler(number, handler)


def _watch(event: str, args: Any) -> None:
    """Refuse what Windows refuses: names, folders that are opened, and files in use that are moved or removed."""
    if _asking:
        return
    if event == "open" and isinstance(args[0], (str, os.PathLike)):
        by_system = args[1] is None  # os.open; tempfile names a folder to `open` and opens a file in it
        if (by_system and Path(args[0]).is_dir()) or str(args[0]).startswith(NO_FOLDERS):
            raise PermissionError(errno.EACCES, "a folder cannot be opened", args[0])
        _check_name(args[0])
    elif event == "os.mkdir":
        _check_name(args[0])
    elif event in ("os.remove", "os.rename", "os.rmdir"):
        for path in args[: 2 if event == "os.rename" else 1]:
            _check_name(path)
            if used := _used(os.path.realpath(path)):
                raise PermissionError(errno.EACCES, f"{event}: {used} is in use", path)


def _check_name(path: Any) -> None:
    name = PurePath(path).name
    if NO_LETTERS & set(name) or name.endswith((".", " ")):
        raise OSError(errno.EINVAL, "no name for a file", path)


def _used(path: str) -> str | None:
    """A file at or below the path that this process has opened or mapped."""
    _asking.append(path)
    try:
        handles = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]  # noqa: PTH208
        held = [str(handle.readlink()) for handle in handles if handle.is_symlink()]
        maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
        held += [line.split(maxsplit=5)[5].strip() for line in maps if "/" in line]
    finally:
        _asking.pop()
    return next((file for file in held if file == path or file.startswith(f"{path}/")), None)
