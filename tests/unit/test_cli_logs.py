from pathlib import Path

from click.testing import CliRunner, Result

from srd.cli.logs import Tail
from srd.cli.main import srd


def logs(directory: Path, *arguments: str) -> Result:
    return CliRunner().invoke(srd, ["--log-dir", str(directory), "logs", *arguments])


def test_the_last_lines_of_one_child(tmp_path: Path) -> None:
    (tmp_path / "redis.log").write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert logs(tmp_path, "redis", "-n", "3").output == "line 99997\nline 99998\nline 99999\n"
    assert logs(tmp_path, "redis", "-n", "0").output == ""
    assert len(logs(tmp_path, "redis", "-n", "90000").output.splitlines()) == 90_000


def test_all_children_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "redis.log").write_text("ready\n")
    (tmp_path / "stunnel.log").write_text("configured\n")
    assert logs(tmp_path).output == "redis: ready\nstunnel: configured\n"


def test_no_logs_is_an_error(tmp_path: Path) -> None:
    result = logs(tmp_path)
    assert result.exit_code == 1
    assert "there are none" in str(result.exception)


def test_a_log_cannot_talk_to_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "redis.log").write_bytes(b"evil \x1b[2J\x07 caf\xc3\xa9 \xff\r\n")
    assert logs(tmp_path, "redis").output == "evil ?[2J? café \ufffd\n"


def test_following_through_a_rotation_and_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "redis.log"
    tail = Tail(path, "")
    assert tail.new() == []
    path.write_text("one\ntw")
    assert tail.last(10) == ["one", "tw"]
    with path.open("a") as log:
        log.write("o\nthree\n")
    assert tail.new() == ["o", "three"]
    path.rename(tmp_path / "redis.log.1")
    with (tmp_path / "redis.log.1").open("a") as old:
        old.write("last words\n")
    path.write_text("first words\n")
    assert tail.new() == ["last words"]
    assert tail.new() == ["first words"]
    path.write_text("")
    assert tail.new() == []
    path.write_text("again\n")
    assert tail.new() == ["again"]
    tail.close()
