"""The command line as a user runs it: in a process of its own where that matters, against a real control socket."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.commandline import environment, srd
from support.situations import WALL, arbiter_situation, at, link, primary_situation, replica_situation, with_node

from srd.changes import ChangeKind, RoleChange
from srd.cli import main as cli_main
from srd.cli.output import duration, size
from srd.cluster import NEVER_PRIORITY
from srd.control.server import ControlServer
from srd.model import ConfigError
from srd.state import Situation, View

ROOT = Path(__file__).parents[2]
# What `srd status` must do without: each costs tens of milliseconds on a fast machine, a second in a slow one.
HEAVY = ("aiohttp", "redis", "pyroute2", "cryptography", "OpenSSL", "rich", "jinja2", "msgspec", "structlog", "asyncio")


@pytest.fixture
def serve(tmp_path: Path) -> Callable[[Situation], ControlServer]:
    return lambda situation: ControlServer(tmp_path / "control.sock", lambda: situation, version="0.1.0")


Serve = Callable[[Situation], ControlServer]


async def ask(serve: Serve, situation: Situation, directory: Path, *arguments: str) -> tuple[int, str, str]:
    server = serve(situation)
    await server.start()
    try:
        return await srd(directory, *arguments)
    finally:
        await server.stop()


async def test_status_of_a_healthy_primary(serve: Serve, tmp_path: Path) -> None:
    code, out, err = await ask(serve, primary_situation(), tmp_path, "status")
    assert (code, err) == (0, "")
    assert out == (
        "redis-1 (192.168.205.10) of orders: primary\n"
        "  health     ok\n"
        "  primary    redis-1 192.168.205.10:6379, 3 of 3 sentinels agree, lease for 3.5s more\n"
        "  links      2/2 protected by ESP\n"
        "  children   redis ready, sentinel ready, stunnel ready\n"
        "  running    srd 0.1.0 for 11m 40s\n"
    )


async def test_status_says_where_the_data_of_before_another_primary_is_kept(serve: Serve, tmp_path: Path) -> None:
    kept = "/var/lib/srd/redis/kept/20261129T210000Z"
    _, out, _ = await ask(serve, primary_situation(kept=kept), tmp_path, "status")
    assert f"  kept       {kept}\n" in out


@pytest.mark.parametrize(
    ("situation", "code", "word"),
    [
        (replica_situation(), 0, "ok"),
        (arbiter_situation(), 0, "ok"),
        (primary_situation(links={"redis-2": link("redis-2", 2)}), 10, "degraded"),
        (primary_situation(children={}), 20, "critical"),
        (replace(primary_situation(), view=View()), 20, "critical"),
    ],
)
async def test_the_exit_status_of_status_is_health(
    serve: Serve, tmp_path: Path, situation: Situation, code: int, word: str
) -> None:
    answered, out, _ = await ask(serve, situation, tmp_path, "status", "-o", "json")
    assert (answered, json.loads(out)["health"]) == (code, word)
    answered, out, _ = await ask(serve, situation, tmp_path, "status")
    assert (answered, word in out) == (code, True)


async def test_list(serve: Serve, tmp_path: Path) -> None:
    code, out, _ = await ask(serve, primary_situation(), tmp_path, "list")
    assert code == 0
    assert out == (
        "NODE     ADDRESS         ROLE     STATE    LAG  LINK         SRD\n"
        "redis-1  192.168.205.10  primary  running  -    -            0.1.0\n"
        "redis-2  192.168.205.11  replica  running  0 B  aes-256-gcm  0.1.0\n"
        "redis-3  192.168.205.12  replica  running  0 B  aes-256-gcm  0.1.0\n"
    )


async def test_list_shows_what_is_asked_of_single_nodes(serve: Serve, tmp_path: Path) -> None:
    tagged = with_node(primary_situation(), "redis-3", priority=50, noloadbalance=True)
    _, out, _ = await ask(serve, with_node(tagged, "redis-2", priority=NEVER_PRIORITY), tmp_path, "list")
    assert [line.partition("0.1.0")[2].strip() for line in out.splitlines()[1:]] == [
        "",
        "nofailover",
        "priority 50, noloadbalance",
    ]


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("links", ["redis-2", "protected", "X25519MLKEM768", "1m 0s", "00001001/00001002", "10 B / 20 B"]),
        ("children", ["redis", "ready", "100", "10m 0s"]),
        (
            "events",
            ["2023-11-14", "redis-2  redis-1  crash  500ms", "600ms", ">= 12 B", "killed by SIGKILL, by redis-2"],
        ),
    ],
)
@pytest.mark.parametrize("situation", [primary_situation(), replace(primary_situation(), view=View())])
async def test_other_tables(serve: Serve, tmp_path: Path, verb: str, words: list[str], situation: Situation) -> None:
    code, out, err = await ask(serve, situation, tmp_path, verb)
    assert (code, err) == (0, "")
    if situation.view.children:
        assert [word for word in words if word not in out] == []
    code, out, _ = await ask(serve, situation, tmp_path, verb, "-o", "json")
    assert (code, json.loads(out)["schema"]) == (0, 1)


@pytest.mark.parametrize(("options", "shown"), [((), range(5, 25)), (("-n", "2"), range(23, 25)), (("-n", "0"), ())])
async def test_events_shows_the_last_ones(
    serve: Serve, tmp_path: Path, options: tuple[str, ...], shown: Sequence[int]
) -> None:
    history = tuple(RoleChange(WALL + epoch, epoch, at(1), at(2)) for epoch in range(25))
    code, out, _ = await ask(serve, primary_situation(history=history), tmp_path, "events", "-o", "json", *options)
    assert (code, [event["epoch"] for event in json.loads(out)["events"]]) == (0, list(shown))


async def test_events_tells_what_is_exact_from_what_is_not(serve: Serve, tmp_path: Path) -> None:
    history = (
        RoleChange(WALL, 0, None, at(1), kind=ChangeKind.FIRST),
        RoleChange(WALL, 1, at(1), at(9), kind=ChangeKind.UNSEEN, before=True),
        RoleChange(
            WALL,
            2,
            at(9),
            at(2),
            kind=ChangeKind.SWITCHOVER,
            cause="srd switchover",
            by=("redis-2 (pid 7, uid 0)",),
            duration_seconds=1.25,
            gap_seconds=0.012,
            complete=True,
        ),
    )
    _, out, _ = await ask(serve, primary_situation(history=history), tmp_path, "events")
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    moment = lines[1][0]
    assert lines[1:] == [
        [moment, "0", "-", "redis-1", "first", "-", "-", "-", "-"],
        [f"before {moment}", "1", "redis-1", "192.168.205.18:6379", "unseen", "-", "-", "-", "-"],
        [
            moment,
            "2",
            "192.168.205.18:6379",
            "redis-2",
            "switchover",
            "1.2s",
            "12ms",
            "0 B",
            "srd switchover, by redis-2 (pid 7, uid 0)",
        ],
    ]


@pytest.mark.parametrize("verb", ["status", "list", "links", "children", "events"])
async def test_without_a_daemon_it_is_one_sentence(tmp_path: Path, verb: str) -> None:
    code, out, err = await srd(tmp_path, verb)
    assert (code, out) == (1, "")
    assert err == (
        f"srd: cannot ask the daemon at {tmp_path}/control.sock: there is no such socket; is srd running? "
        "systemctl status srd\n"
    )


async def test_status_imports_nothing_heavy(serve: Serve, tmp_path: Path) -> None:
    server = serve(primary_situation())
    await server.start()
    code = (
        "import sys; sys.argv = ['srd', 'status']\n"
        "from srd.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env=environment(tmp_path), cwd=ROOT, stdout=subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    await server.stop()
    assert out.decode().splitlines()[0].endswith("primary")
    assert out.decode().splitlines()[-1] == "[]"


async def test_watch_goes_on_until_it_is_interrupted(serve: Serve, tmp_path: Path) -> None:
    server = serve(primary_situation(links={}))
    await server.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "srd", "status", "-o", "json", "--watch", "0.1"),
        env=environment(tmp_path, PYTHONUNBUFFERED="1"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        documents = [json.loads(await process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        await process.communicate()
    await server.stop()
    assert [document["health"] for document in documents] == ["degraded"] * 3
    assert process.returncode == 10


async def test_colour_only_on_a_terminal_that_wants_it(serve: Serve, tmp_path: Path) -> None:
    server = serve(primary_situation())
    await server.start()
    seen = {}
    for name, more in (("plain", {"NO_COLOR": "1"}), ("colour", {})):
        main_end, child_end = os.openpty()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "srd", "list"),
            env=environment(tmp_path, TERM="xterm", **more),
            cwd=ROOT,
            stdout=child_end,
        )
        assert await asyncio.wait_for(process.wait(), 60) == 0
        seen[name] = os.read(main_end, 65536)
        os.close(main_end)
        os.close(child_end)
    await server.stop()
    assert b"\x1b" not in seen["plain"]
    assert b"\x1b[" in seen["colour"]
    assert b"redis-3" in seen["colour"]


@pytest.mark.parametrize("arguments", [["frobnicate"], ["status", "-o", "xml"], ["--nonsense"], ["logs", "nginx"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli_main.srd, arguments).exit_code == 2


def test_help_needs_no_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("srd.cli.") and name != "srd.cli.main"]:
        monkeypatch.delitem(sys.modules, name)
    result = CliRunner().invoke(cli_main.srd, ["--help"])
    assert result.exit_code == 0
    assert [verb for verb in cli_main.VERBS if verb not in result.output] == []
    assert [name for name in sys.modules if name.startswith("srd.cli.") and name != "srd.cli.main"] == []


def test_every_verb_exists_and_has_help() -> None:
    for verb in cli_main.VERBS:
        result = CliRunner().invoke(cli_main.srd, [verb, "--help"])
        assert result.exit_code == 0, verb
        assert result.output.startswith(f"Usage: srd {verb}")


def test_every_verb_is_documented() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    for verb in cli_main.VERBS:
        assert f"| `{verb}" in text, verb


def test_an_error_is_one_sentence_with_its_own_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def fails() -> None:
        raise ConfigError("read", "cluster.toml", "no such file")

    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda *_: fails)
    monkeypatch.setattr(sys, "argv", ["srd", "check"])
    with pytest.raises(SystemExit) as ended:
        cli_main.main()
    assert ended.value.code == 78
    assert capsys.readouterr().err == "srd: cannot read cluster.toml: no such file\n"


def test_version() -> None:
    for arguments in (["--version"], ["version"]):
        assert CliRunner().invoke(cli_main.srd, arguments).output.startswith("srd 0.")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = CliRunner().invoke(cli_main.srd, ["completion", shell])
    assert result.exit_code == 0
    assert "_SRD_COMPLETE" in result.output


def test_bash_completes_verbs(tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "srd"],
        env=environment(tmp_path, _SRD_COMPLETE="bash_complete", COMP_WORDS="srd ch", COMP_CWORD="1"),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.stdout.split() == ["plain,check", "plain,children"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0s"), (59.9, "59.9s"), (60, "1m 0s"), (3661, "1h 1m"), (90000, "1d 1h")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--file", "my.toml", "--node", "a=192.0.2.1"), 2, "or --file"),
        (("orders",), 2, "no --node given"),
        (("orders", "--node", "192.0.2.1"), 2, "it is not NAME=ADDRESS"),
        (('or"ders', "--node", "a=192.0.2.1"), 78, "of these arguments:1: cluster: 'or\"ders' is not a name"),
        (("\U0001f600", "--node", "a=192.0.2.1"), 78, "is not a name"),
        (("orders", "--node", "a=192.0.2.1,here"), 78, "'here' is not an IP address"),
        (("orders", "--node", "a=192.0.2.1", "--node", "a=192.0.2.2"), 78, "a is node 'a' already"),
        (("orders", "--node", "client=192.0.2.1"), 78, "no node may be called 'client'"),
    ],
)
async def test_init_refuses_what_it_cannot_use_and_makes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    output = tmp_path / "bundles"
    returned, out, err = await srd(tmp_path, "init", *arguments, "-o", str(output))
    assert (returned, out) == (status, "")
    assert words in err
    assert "Traceback" not in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("nodes", "advice"),
    [(1, "nothing takes over"), (2, "no majority is left when either is lost"), (3, "")],
)
async def test_init_says_what_speaks_against_one_node_or_two(tmp_path: Path, nodes: int, advice: str) -> None:
    arguments = [word for number in range(1, nodes + 1) for word in ("--node", f"n{number}=192.0.2.{number}")]
    returned, out, err = await srd(tmp_path, "init", "orders", *arguments, "-o", str(tmp_path / "bundles"))
    assert returned == 0
    assert "is the bundle of n1" in out
    assert advice in err if advice else err == ""
