from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from srd.model import ConfigError, PermissionRefusedError, SrdError
from srd.supervise.files import (
    Owner,
    find_owner,
    make_own_directory,
    make_service_directory,
    open_log,
    write_private,
)

ME = Owner("me", os.geteuid(), os.getegid(), switch=False)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_file_is_replaced_whole_and_for_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "redis.conf"
    path.write_text("a much longer earlier text")
    path.chmod(0o644)
    write_private(path, b"new", ME)
    assert path.read_bytes() == b"new"
    assert mode_of(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_a_private_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "redis.conf"
    path.symlink_to(victim)
    write_private(path, b"secret", ME)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


def test_a_failed_write_names_the_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "redis.conf"
    path.mkdir()
    (path / "in the way").touch()
    with pytest.raises(SrdError, match=r"write .*redis\.conf"):
        write_private(path, b"secret", ME)
    assert list(tmp_path.iterdir()) == [path]


def test_a_service_directory_is_private_and_its_parent_can_be_passed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    make_service_directory(state / "redis", ME)
    make_service_directory(state / "redis", ME)
    assert mode_of(state / "redis") == 0o700
    assert mode_of(state) == 0o711


def test_a_link_in_the_place_of_a_service_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    (tmp_path / "redis").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SrdError, match="make the directory"):
        make_service_directory(tmp_path / "redis", ME)
    assert mode_of(tmp_path / "elsewhere") == 0o755


def test_a_directory_keeps_what_more_it_allows(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run").chmod(0o755)
    make_own_directory(tmp_path / "run", 0o711)
    assert mode_of(tmp_path / "run") == 0o755


def test_a_log_is_appended_to_and_readable_by_its_group(tmp_path: Path) -> None:
    path = tmp_path / "log" / "redis.log"
    for word in (b"one ", b"two"):
        descriptor = open_log(path)
        os.write(descriptor, word)
        os.close(descriptor)
    assert path.read_bytes() == b"one two"
    assert mode_of(path) == 0o640


def test_a_log_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "redis.log").symlink_to(tmp_path / "passwd")
    with pytest.raises(SrdError, match="open the log"):
        open_log(tmp_path / "redis.log")


def test_an_unknown_user_is_the_operators_mistake() -> None:
    with pytest.raises(ConfigError, match=r"redis\.user.*no user 'nobody-at-all'"):
        find_owner("nobody-at-all", "redis.user")


def test_only_root_can_run_programs_as_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(PermissionRefusedError, match="srd is not root"):
        find_owner("root", "redis.user")
