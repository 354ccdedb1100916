"""A directory that appears whole or not at all.

It is written beside its destination, under a hidden name, and renamed at the end. Whatever an interruption leaves
behind has a name that tells what it is, and the next run with the same destination clears it away.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["check_destination", "new_directory"]

RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextmanager
def new_directory(
    destination: Path, *, overwrite: bool = False, check_replaceable: Callable[[Path], None]
) -> Iterator[Path]:
    """Gives an empty directory to fill; when the block ends without an error, it is at `destination`.

    Args:
        destination: where the directory will be.
        overwrite: replace what is there, if `check_replaceable` lets it pass.
        check_replaceable: raises an error unless the existing directory it is given may be deleted.

    Raises:
        FileExistsError: something is at the destination and may not be replaced.
        BlockingIOError: another process is writing the same destination.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _lock(destination):
        _recover(destination)
        check_destination(destination, overwrite=overwrite, check_replaceable=check_replaceable)
        staging = _staging(destination)
        try:
            staging.mkdir()
            yield staging
            _flush(staging)
            # Again: hours may have passed.
            check_destination(destination, overwrite=overwrite, check_replaceable=check_replaceable)
            _publish(staging, destination)
        finally:
            # Gone after a first publication; the replaced directory after another; an unfinished one after an error.
            if staging.exists():
                shutil.rmtree(staging)


def check_destination(destination: Path, *, overwrite: bool, check_replaceable: Callable[[Path], None]) -> None:
    """Refuses a destination that `new_directory` would refuse."""
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "destination exists; overwrite=True replaces it", str(destination))
    if destination.is_symlink() or not destination.is_dir():
        raise FileExistsError(errno.EEXIST, "only a directory can be overwritten, and this is none", str(destination))
    check_replaceable(destination)


def _staging(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.dynconv-incomplete")


def _replaced(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.dynconv-replaced")


@contextmanager
def _lock(destination: Path) -> Iterator[None]:
    path = destination.with_name(f".{destination.name}.dynconv-lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process is writing this destination", str(destination)) from None
    try:
        yield
    finally:
        # Before the lock is given up: afterwards the file may be another process's lock.
        path.unlink(missing_ok=True)
        lock.release()


def _recover(destination: Path) -> None:
    """Clears away what a killed run left, and brings back what it had moved aside."""
    staging, replaced = _staging(destination), _replaced(destination)
    if replaced.exists() and not os.path.lexists(destination):
        replaced.rename(destination)
    for leftover in (staging, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)


def _publish(staging: Path, destination: Path) -> None:
    if not os.path.lexists(destination):
        staging.rename(destination)
    elif not _exchange(staging, destination):
        replaced = _replaced(destination)
        destination.rename(replaced)
        try:
            staging.rename(destination)
        except BaseException:
            replaced.rename(destination)
            raise
        shutil.rmtree(replaced)
    _flush_directory(destination.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two directories in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _flush(directory: Path) -> None:
    """A rename may reach the disk before the files do: a power failure would leave a destination of empty files."""
    for root, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(root))


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
