"""`srd install` and `srd uninstall` into the root of another system."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from srd.cli.main import srd
from srd.model import ConfigError, RefusedError

PROGRAM = "/usr/local/lib/srd/bin/srd"
FILES = {
    "etc/systemd/system/srd.service",
    "etc/systemd/system/srd-failclosed.service",
    "etc/sysusers.d/srd.conf",
    "etc/tmpfiles.d/srd.conf",
    "etc/logrotate.d/srd",
    "usr/local/bin/srd",
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(srd, arguments)


def install(root: Path, *more: str, program: str = PROGRAM) -> Result:
    return run("install", "--root", str(root), "--program", program, *more)


def words(result: Result) -> dict[str, str]:
    """Each line's word, by the file that it is about."""
    assert result.exit_code == 0, result.exception
    lines = [line.rsplit("  ", 1) for line in result.output.splitlines()]
    return {what.split(" -> ")[0]: word for word, what in lines}


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or path.is_file()}


def test_what_is_installed_names_the_program_that_is_installed_and_is_left_alone_the_next_time(tmp_path: Path) -> None:
    first = words(install(tmp_path))
    assert first == {str(tmp_path / file): "written" for file in FILES}
    assert files(tmp_path) == FILES
    unit = (tmp_path / "etc/systemd/system/srd.service").read_text()
    assert f"ExecStart={PROGRAM} run\n" in unit
    assert "/opt/srd" not in unit + (tmp_path / "etc/systemd/system/srd-failclosed.service").read_text()
    assert (tmp_path / "usr/local/bin/srd").readlink() == Path(PROGRAM)
    (tmp_path / "etc/logrotate.d/srd").write_text("of an earlier version")
    again = words(install(tmp_path))
    assert {path: word for path, word in again.items() if word != "same"} == {
        str(tmp_path / "etc/logrotate.d/srd"): "written"
    }


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path: Path) -> None:
    assert set(words(install(tmp_path, "--dry-run")).values()) == {"would be written"}
    assert files(tmp_path) == set()
    install(tmp_path)
    assert set(words(install(tmp_path, "--dry-run")).values()) == {"same"}
    assert set(words(run("uninstall", "--root", str(tmp_path), "--dry-run")).values()) == {"would be removed"}
    assert files(tmp_path) == FILES


def test_an_uninstall_removes_just_what_was_installed_and_a_purge_the_nodes_own_too(tmp_path: Path) -> None:
    install(tmp_path)
    own = {"etc/srd/node.key", "var/lib/srd/redis/dump.rdb", "var/log/srd/redis.log"}
    for file in own | {"etc/systemd/system/srd.service.d/mine.conf"}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert words(run("uninstall", "--root", str(tmp_path))) == {str(tmp_path / file): "removed" for file in FILES}
    assert files(tmp_path) == own | {"etc/systemd/system/srd.service.d/mine.conf"}
    run("uninstall", "--root", str(tmp_path), "--purge")
    assert files(tmp_path) == {"etc/systemd/system/srd.service.d/mine.conf"}


def test_a_command_of_somebody_elses_is_not_replaced_and_not_removed(tmp_path: Path) -> None:
    other = tmp_path / "usr/local/bin/srd"
    other.parent.mkdir(parents=True)
    other.write_text("another srd")
    assert isinstance(install(tmp_path).exception, RefusedError)
    run("uninstall", "--root", str(tmp_path))
    assert other.read_text() == "another srd"


@pytest.mark.parametrize(
    ("program", "error", "why"),
    [
        ("/home/me/srd/bin/srd", ConfigError, "does not see what is below /home"),
        ("/tmp/srd/bin/srd", ConfigError, "does not see what is below /tmp"),
        ("bin/srd", ConfigError, "absolute"),
        ("/srd", ConfigError, "bin/srd of an environment"),
        ("/usr/local/bin/srd-2", ConfigError, "bin/srd of an environment"),
        ("/usr/lib/srd/bin/srd", RefusedError, "Debian package"),
    ],
)
def test_a_program_that_the_units_could_not_run_is_refused(
    tmp_path: Path, program: str, error: type[Exception], why: str
) -> None:
    refused = install(tmp_path, program=program)
    assert isinstance(refused.exception, error)
    assert why in str(refused.exception)
    assert files(tmp_path) == set()
