"""What belongs to a service's user is made, written and ended as that user; as root."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from srd.model import ConfigError, SrdError
from srd.supervise.become import acting_as
from srd.supervise.files import Owner, find_owner, make_service_directory, write_private


@pytest.fixture
def redis() -> Owner:
    return find_owner("redis", "redis.user")


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A directory that everybody can reach."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    yield tmp_path / "state"
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o700)


def status_of(task: str) -> dict[str, str]:
    lines = Path(f"/proc/{task}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_one_thread_is_another_account_with_no_right_of_roots_and_no_other_thread_is(redis: Owner) -> None:
    def look() -> tuple[dict[str, str], dict[str, str]]:
        return status_of("thread-self"), status_of(f"{os.getpid()}/task/{os.getpid()}")

    before = status_of("thread-self")
    inside, main = acting_as(redis.uid, redis.gid, look)
    assert inside["Uid"].split() == [str(redis.uid)] * 4
    assert inside["Gid"].split() == [str(redis.gid)] * 4
    assert (inside["Groups"], int(inside["CapEff"], 16)) == ("", 0)
    for name in ("Uid", "Gid", "Groups", "CapEff"):
        assert main[name] == before[name] == status_of("thread-self")[name]


def test_what_fails_as_another_account_fails_here(redis: Owner, tmp_path: Path) -> None:
    (tmp_path / "roots").touch(mode=0o600)
    with pytest.raises(PermissionError):
        redis.do((tmp_path / "roots").read_bytes)


def test_a_service_directory_and_its_files_are_the_services_and_its_parent_is_as_before(
    redis: Owner, state: Path
) -> None:
    for _ in range(2):
        make_service_directory(state / "redis", redis)
        write_private(state / "redis" / "redis.conf", b"text", redis)
    found = [(path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in (state / "redis").glob("*")]
    assert found == [(redis.uid, 0o600)]
    assert ((state / "redis").stat().st_uid, stat.S_IMODE((state / "redis").stat().st_mode)) == (redis.uid, 0o700)
    assert (state.stat().st_uid, stat.S_IMODE(state.stat().st_mode)) == (0, 0o711)


def test_a_service_directory_of_another_user_is_refused_with_the_remedy(redis: Owner, state: Path) -> None:
    make_service_directory(state / "redis", Owner("stranger", 54321, 54321, switch=True))
    with pytest.raises(ConfigError, match=rf"belongs to user 54321.*chown -R redis: {state}/redis"):
        make_service_directory(state / "redis", redis)


def test_a_link_in_a_service_directory_leads_no_further_than_the_service_itself_could_go(
    redis: Owner, state: Path
) -> None:
    make_service_directory(state / "redis", redis)
    (state / "roots").mkdir(mode=0o700)
    (state / "redis" / "data").symlink_to(state / "roots")
    with pytest.raises(SrdError, match="Permission denied"):
        write_private(state / "redis" / "data" / "redis.conf", b"text", redis)
