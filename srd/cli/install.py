"""`srd install` puts on a machine what its service manager needs to run srd, `srd uninstall` takes just that away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import click

from srd.control.client import is_answered
from srd.model import PLAIN_ENVIRONMENT, ConfigError, Paths, PermissionRefusedError, RefusedError, SrdError

# Where the files of srd/units go. Those in the package name /opt/srd as the place of the program.
_TARGETS: Final = {
    "srd.service": "etc/systemd/system/srd.service",
    "srd-failclosed.service": "etc/systemd/system/srd-failclosed.service",
    "srd.sysusers": "etc/sysusers.d/srd.conf",
    "srd.tmpfiles": "etc/tmpfiles.d/srd.conf",
    "srd.logrotate": "etc/logrotate.d/srd",
}
_LINK: Final = "usr/local/bin/srd"
_SHIPPED_HOME: Final = "/opt/srd"
_UNITS: Final = ("srd.service", "srd-failclosed.service")
_PACKAGE_HOME: Final = Path("/usr/lib/srd")  # of the Debian package, which has its own units there
# ProtectHome= and PrivateTmp= hide these from the unit.
_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - nothing is written there
_MODE: Final = 0o644

_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
_root = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path("/"),
    help="The root directory of another system, an image say: files only, no program is run.",
)


@dataclass(frozen=True, slots=True)
class _Machine:
    """Where things are put; with `dry_run` only said."""

    root: Path
    dry_run: bool

    @property
    def is_this(self) -> bool:
        return self.root.resolve() == Path("/")

    def say(self, done: str, what: object) -> None:
        click.echo(f"{'would be ' if self.dry_run and done != 'same' else ''}{done}  {what}")


@click.command("install")
@_dry_run
@_root
@click.option(
    "--program",
    type=click.Path(path_type=Path),
    help="The srd that the units are to run, as bin/srd of its environment.  [default: this one]",
)
def install_command(root: Path, program: Path | None, *, dry_run: bool) -> None:
    """Install the units, the accounts, the rotation of logs, and /usr/local/bin/srd; start and enable nothing.

    What is there already and the same is left alone, so it may be run again, after an upgrade say.
    """
    machine = _Machine(root, dry_run)
    program = program if program is not None else Path(sys.prefix) / "bin" / "srd"
    _check_program(program)
    for name, target in _TARGETS.items():
        _write(machine, root / target, _text(name, program))
    _link(machine, root / _LINK, program)
    if machine.is_this:
        _run(machine, "systemd-sysusers", "srd.conf")
        _run(machine, "systemd-tmpfiles", "--create", "srd.conf")
        _run_manager(machine, "daemon-reload")


@click.command("uninstall")
@_dry_run
@_root
@click.option("--purge", is_flag=True, help="Remove this node's bundle, its data and its logs too, for good.")
@click.pass_obj
def uninstall_command(paths: Paths, root: Path, *, purge: bool, dry_run: bool) -> None:
    """Remove what `srd install` has installed; bundle, data and logs stay. Refused while srd or a child of it runs.

    The protection stays in the kernel, closed, until the next boot: `srd teardown`, before this, opens the machine.
    """
    machine = _Machine(root, dry_run)
    if machine.is_this:
        if Path(sys.prefix) == _PACKAGE_HOME:
            remedy = f"apt {'purge' if purge else 'remove'} srd"
            raise RefusedError("uninstall", "srd", "the Debian package has installed it", remedy)
        _refuse_while_it_runs(paths)
        if any((root / _TARGETS[unit]).exists() for unit in _UNITS):
            _run_manager(machine, "disable", *_UNITS)
    for target in _TARGETS.values():
        _remove(machine, root / target)
    link = root / _LINK
    if link.is_symlink() and link.readlink().name == "srd":
        _remove(machine, link)
    if purge:
        for directory in (paths.config_dir, paths.state_dir, paths.log_dir, paths.run_dir):
            _remove(machine, root / directory.relative_to("/"))
    if machine.is_this:
        _run_manager(machine, "daemon-reload")


def _check_program(program: Path) -> None:
    if not program.is_absolute():
        raise ConfigError("install", str(program), "a unit names its program by an absolute path")
    if program.parts[-2:] != ("bin", "srd"):
        raise ConfigError("install", str(program), "the units run bin/srd of an environment, and this is not one")
    if _PACKAGE_HOME in program.parents:
        raise RefusedError(
            "install", str(program), "the Debian package has its own units", "systemctl enable --now srd"
        )
    hidden = next((place for place in _HIDDEN if program.is_relative_to(place)), None)
    if hidden is not None:
        remedy = f"make srd's environment elsewhere: python3 -m venv {_SHIPPED_HOME}"
        raise ConfigError("install", str(program), f"the unit does not see what is below {hidden}", remedy)


def _text(name: str, program: Path) -> str:
    return (files("srd") / "units" / name).read_text(encoding="utf-8").replace(_SHIPPED_HOME, str(program.parents[1]))


def _write(machine: _Machine, path: Path, text: str) -> None:
    try:
        if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
            machine.say("same", path)
            return
        machine.say("written", path)
        if machine.dry_run:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.srd")
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(_MODE)
        temporary.rename(path)
    except OSError as error:
        raise _refused("write", path, error) from error


def _link(machine: _Machine, path: Path, program: Path) -> None:
    try:
        if path.is_symlink() and path.readlink() == program:
            machine.say("same", path)
            return
        if os.path.lexists(path) and not path.is_symlink():
            raise RefusedError("write", str(path), "it is a file of somebody else's", "move it out of the way")
        machine.say("written", f"{path} -> {program}")
        if machine.dry_run:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(program)
    except OSError as error:
        raise _refused("write", path, error) from error


def _remove(machine: _Machine, path: Path) -> None:
    if not os.path.lexists(path):
        return
    machine.say("removed", path)
    if machine.dry_run:
        return
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise _refused("remove", path, error) from error


def _refused(operation: str, path: Path, error: OSError) -> SrdError:
    kind = PermissionRefusedError if isinstance(error, PermissionError) else SrdError
    return kind(operation, str(path), error.strerror or str(error), "run it as root")


def _run_manager(machine: _Machine, *arguments: str) -> None:
    if Path("/run/systemd/system").is_dir():
        _run(machine, "systemctl", *arguments)
    else:  # a container, or an image that is being made: sd_booted(3)
        machine.say("left out", f"systemctl {' '.join(arguments)}: systemd does not run here")


def _run(machine: _Machine, *command: str) -> None:
    machine.say("run", " ".join(command))
    if machine.dry_run:
        return
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=PLAIN_ENVIRONMENT)
    except OSError as error:
        raise SrdError("run", command[0], error.strerror or str(error)) from error
    if done.returncode:
        raise SrdError("run", " ".join(command), done.stderr.strip() or f"status {done.returncode}")


def _refuse_while_it_runs(paths: Paths) -> None:
    from srd.supervise.programs import own_children  # noqa: PLC0415 - msgspec takes 40 ms to import

    if is_answered(paths.control_socket):
        raise RefusedError("uninstall", "srd", "it runs", "systemctl stop srd")
    for child in sorted(own_children(paths)):  # left by `srd stop --keep-data-path`, or by a srd that was killed
        remedy = "systemctl start srd, which adopts it, then systemctl stop srd"
        raise RefusedError("uninstall", "srd", f"its {child} runs", remedy)
