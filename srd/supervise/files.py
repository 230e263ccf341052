"""Files and directories that belong to a service's own user. Everything here blocks: call it from a thread.

A service's directory is writable by that service, so what stands in it is not to be trusted: files are made under a
random name that must not exist yet and renamed into place; directories are opened without following links.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srd.model import ConfigError, PermissionRefusedError, SrdError

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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, PRIVATE_FILE)
        try:
            os.fchmod(descriptor, PRIVATE_FILE)
            if owner is not None and owner.switch:
                os.fchown(descriptor, owner.uid, owner.gid)
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                stream.write(content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SrdError("write", str(path), error.strerror or str(error)) from error


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
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=PRIVATE_DIRECTORY)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, PRIVATE_DIRECTORY)
            if owner.switch:
                os.fchown(descriptor, owner.uid, owner.gid)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SrdError("make the directory", str(path), error.strerror or str(error)) from error
    if owner.switch:
        _require_reachable(path, owner)


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
