"""Files and directories that belong to a service's own user. Everything here blocks: call it from a thread.

A service's directory is writable by that service, so what stands in it is not to be trusted: files are made under a
random name that must not exist yet and renamed into place; directories are opened without following links. And what
belongs to another user is made, written and looked at as that user: srd needs no right over anybody's files.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from srd.model import ConfigError, PermissionRefusedError, SrdError
from srd.supervise.become import acting_as

T = TypeVar("T")

PRIVATE_FILE: Final = 0o600
PRIVATE_DIRECTORY: Final = 0o700
LOG_DIRECTORY: Final = 0o750
# Others may pass through to what is theirs, but not list.
TRAVERSABLE_DIRECTORY: Final = 0o711
LOG_FILE: Final = 0o640


@dataclass(frozen=True, slots=True)
class Owner:
    """The account that a service runs as; `switch` says whether that is another one than srd's own."""

    name: str
    uid: int
    gid: int
    switch: bool

    def do(self, act: Callable[[], T]) -> T:
        """Call `act` with this account's rights and no others."""
        return acting_as(self.uid, self.gid, act) if self.switch else act()


def find_owner(name: str, key: str) -> Owner:
    """Look up a service's account; `key` is the dotted key that names it, for the error."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError("use", key, f"there is no user {name!r}", f"adduser --system --group {name}") from None
    switch = entry.pw_uid != os.geteuid()
    if switch and os.geteuid() != 0:
        raise PermissionRefusedError(
            "run a program as", name, f"srd is not root but user {os.geteuid()}", f"start srd as root or as {name}"
        )
    return Owner(name, entry.pw_uid, entry.pw_gid, switch)


def write_private(path: Path, content: bytes, owner: Owner | None = None) -> None:
    """Replace a file as a whole, mode 0600, on disk before this returns; `owner` None leaves it srd's own."""
    try:
        if owner is None:
            _replace(path, content)
        else:
            owner.do(lambda: _replace(path, content))
    except OSError as error:
        raise SrdError("write", str(path), error.strerror or str(error)) from error


def remove_own(path: Path) -> None:
    """Remove a file of srd's own, from the disk too before this returns; one that is not there is no error."""
    try:
        path.unlink(missing_ok=True)
        _sync_directory(path.parent)
    except OSError as error:
        raise SrdError("remove", str(path), error.strerror or str(error)) from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, PRIVATE_FILE)
        try:
            os.fchmod(descriptor, PRIVATE_FILE)
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                stream.write(content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
        _sync_directory(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_own_directory(path: Path, mode: int) -> None:
    """Make a directory of srd's own with at least this mode; an existing one keeps what more it allows."""
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
        found = stat.S_IMODE(path.stat().st_mode)
        if found & mode != mode:
            path.chmod(found | mode)
    except OSError as error:
        raise SrdError("make the directory", str(path), error.strerror or str(error)) from error


def make_service_directory(path: Path, owner: Owner) -> None:
    """Make a directory, mode 0700, that belongs to a service's user, who must be able to reach it."""
    make_own_directory(path.parent, TRAVERSABLE_DIRECTORY)
    if owner.switch:
        _require_reachable(path, owner)
    try:
        if not os.path.lexists(path):
            _make_directory_of(owner, path)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid != owner.uid:
            reason = f"it belongs to user {found.st_uid}, and the service is to run as {owner.name}"
            raise ConfigError("use", str(path), reason, f"chown -R {owner.name}: {path}")
        owner.do(lambda: _make_private(path))
    except OSError as error:
        raise SrdError("make the directory", str(path), error.strerror or str(error)) from error


def _make_directory_of(owner: Owner, path: Path) -> None:
    """Make a directory as its owner, who may write where it is to be for just that moment, by srd's own group."""
    if not owner.switch:
        path.mkdir(PRIVATE_DIRECTORY)
        return
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        before = os.fstat(parent)
        mode = stat.S_IMODE(before.st_mode)
        os.fchmod(parent, mode | stat.S_IWGRP | stat.S_IXGRP)
        make = partial(os.mkdir, path.name, PRIVATE_DIRECTORY, dir_fd=parent)
        try:
            acting_as(owner.uid, owner.gid, make, groups=(before.st_gid,))
        finally:
            os.fchmod(parent, mode)
    finally:
        os.close(parent)


def _make_private(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, PRIVATE_DIRECTORY)
    finally:
        os.close(descriptor)


def _require_reachable(path: Path, owner: Owner) -> None:
    for parent in path.parents:
        found = parent.stat()
        mode = stat.S_IMODE(found.st_mode)
        group = found.st_gid == owner.gid and mode & stat.S_IXGRP
        if not (mode & stat.S_IXOTH or group or (found.st_uid == owner.uid and mode & stat.S_IXUSR)):
            raise ConfigError("use", str(path), f"user {owner.name} may not pass {parent}", f"chmod o+x {parent}")


def open_log(path: Path) -> int:
    """Open a service's log for appending, mode 0640, and return the descriptor.

    Never a pipe: its reader may die with srd, and an unread one stops a program that logs (stunnel, after 64 KiB).
    """
    make_own_directory(path.parent, LOG_DIRECTORY)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, LOG_FILE)
        os.fchmod(descriptor, LOG_FILE)
    except OSError as error:
        raise SrdError("open the log", str(path), error.strerror or str(error)) from error
    return descriptor
