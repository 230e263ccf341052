"""Put a service's files in place and start it. Everything here blocks: it runs in a thread."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog

from srd.cluster import Config, Node
from srd.desired import Start
from srd.listening import Listeners
from srd.model import ConfigError, Endpoint, NodeKind, Paths, Secrets, Service, SrdError
from srd.reconcile import boottime
from srd.supervise import programs, render
from srd.supervise.adopt import Register, argv_hash, record_of
from srd.supervise.become import send_signal
from srd.supervise.datadir import DataDirectory
from srd.supervise.files import Owner, make_service_directory, write_private
from srd.supervise.probe import Shown
from srd.supervise.running import Former, Running
from srd.supervise.spawn import Command, Started, spawn

log = structlog.get_logger(__name__)

# Of what sentinel kept before it was rebuilt; one such file stays.
FORMER_SUFFIX: Final = ".former"

TLS_FILES: Final = ("tls.crt", "tls.key", "ca.crt")


class Launcher:
    """Starts the services of one node."""

    def __init__(
        self, *, config: Config, node: Node, paths: Paths, secrets: Secrets, register: Register, tls_sockets: Listeners
    ) -> None:
        self._config = config
        self._node = node
        self._paths = paths
        self._secrets = secrets
        self._register = register
        self._tls_sockets = tls_sockets
        self._shown: Shown | None = None  # what stunnel was last given, once that is known
        self.data = DataDirectory(config, paths)

    def adopt(self, config: Config) -> None:
        """Render the next files by a changed cluster.toml."""
        self._config = config
        self.data.adopt(config)

    def tls_differs(self) -> bool:
        """Whether the bundle has another certificate, key or authority than stunnel was started with."""
        directory = self._paths.service_dir(Service.STUNNEL)
        try:
            given = [self._paths.bundle_file(name).read_bytes() for name in TLS_FILES]
            owner = programs.owner_of(self._config, Service.STUNNEL)
            return given != owner.do(lambda: [(directory / name).read_bytes() for name in TLS_FILES])
        except (OSError, SrdError):
            return True  # the next start says what is wrong with which file

    def shown_tls(self) -> Shown:
        """Return what stunnel was last given to show, be it by an earlier srd; `SrdError` if that is gone."""
        if self._shown is None:
            directory = self._paths.service_dir(Service.STUNNEL)
            owner = programs.owner_of(self._config, Service.STUNNEL)
            try:
                files = owner.do(lambda: [(directory / name).read_bytes() for name in ("tls.crt", "ca.crt")])
            except OSError as error:
                raise SrdError("read", str(directory), error.strerror or str(error), "srd restart stunnel") from error
            self._shown = Shown(*(content.decode("ascii", "replace") for content in files))
        return self._shown

    def argv(self, service: Service) -> tuple[str, ...]:
        """Return the argument vector that the service is started with. No secret is ever in it."""
        program = programs.find_program(self._config, service)
        mode = ("--sentinel",) if service is Service.SENTINEL else ()
        return (program.argv0, str(self._file(service)), *mode)

    def argv_hash(self, service: Service) -> str | None:
        """Return what a record of the service would hold now; None when its program is not there."""
        try:
            return argv_hash(self.argv(service))
        except ConfigError:
            return None

    def settings(self, service: Service) -> str:
        """Return a digest of what cluster.toml says that the service gets by a start alone, not by a reload.

        Empty for sentinel: its file is its own, and what is set in it another way is the doctor's business.
        """
        config, addresses = self._config, [str(address) for address in self._node.addresses]
        if service is Service.SENTINEL:
            return ""
        said: list[object] = [addresses, config.redis.port]
        if service is Service.REDIS:
            said += [config.listen_localhost, msgspec.structs.replace(config.redis, stop_grace=1.0)]
        else:
            said += [config.tls]
        return hashlib.sha256(msgspec.json.encode(said)).hexdigest()

    def launch(self, service: Service, start: Start, former: Former) -> Running:
        """Write the service's files, start it and record it; `SrdError` says why not."""
        program = programs.find_program(self._config, service)
        owner = programs.owner_of(self._config, service)
        endpoints = programs.listen_endpoints(self._config, self._node, service)
        for endpoint in endpoints:
            if endpoint not in self._tls_sockets.endpoints and (taken := programs.check_endpoint(endpoint)) is not None:
                raise taken
        directory = self._paths.service_dir(service)
        make_service_directory(directory, owner)
        writers: dict[Service, Callable[[Owner, Start], None]] = {
            Service.REDIS: partial(self._write_redis, former),
            Service.SENTINEL: self._write_sentinel,
            Service.STUNNEL: self._write_stunnel,
        }
        writers[service](owner, start)
        argv = self.argv(service)
        # In the order of stunnel.conf's sections: the n-th socket is the n-th section's.
        sockets = self._tls_sockets.open(endpoints) if service is Service.STUNNEL else ()
        handed = tuple(listener.fileno() for listener in sockets)
        log, settings = self._paths.log_file(service), programs.settings_of(service)
        if former.given_up.is_set():
            raise SrdError("start", service, "it is not wanted any more")
        started = spawn(Command(program.path, argv, owner, directory, log, handed, settings))
        return self._record(service, started, argv, former.restarts)

    def _record(self, service: Service, started: Started, argv: tuple[str, ...], restarts: int) -> Running:
        now = boottime()
        try:
            settings = self.settings(service)
            record = record_of(service, started.pid, argv, started=now, restarts=restarts, settings=settings)
            self._register.put(record)
        except SrdError:
            # A child that the next srd would not know is worse than none.
            send_signal(started.pid, started.pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, started.pidfd, os.WEXITED)
            os.close(started.pidfd)
            raise
        return Running(pid=started.pid, pidfd=started.pidfd, started=now, restarts=restarts, adopted=False)

    def _file(self, service: Service) -> Path:
        return self._paths.service_dir(service) / f"{service}.conf"

    def _write_redis(self, former: Former, owner: Owner, start: Start) -> None:
        self.data.prepare(owner, start, former)
        directory = self._paths.service_dir(Service.REDIS)
        text = render.redis_conf(self._config, self._node, self._secrets, directory, start.primary)
        write_private(self._file(Service.REDIS), text.encode(), owner)

    def _write_sentinel(self, owner: Owner, start: Start) -> None:
        file = self._file(Service.SENTINEL)
        if owner.do(lambda: _monitors(file)):
            return
        if start.hold is not None and start.named is None:
            raise SrdError("write", str(file), f"who is primary is not known: {start.hold}")
        if start.doubted and owner.do(lambda: os.path.lexists(file)):
            # It may have voted a moment ago, and would not know that (ha/rebuild.py).
            raise SrdError("replace", str(file), "it names no primary, and the sentinels are replacing theirs just now")
        if owner.do(lambda: _put_aside(file)):
            log.warning("sentinel's file names no primary, so it gets a new one", file=str(file))
        first = self._node if self._node.kind is NodeKind.REDIS else self._config.redis_nodes[0]
        own = Endpoint(first.address, self._config.redis.port)
        self._render_sentinel(owner, start.named or start.primary or own)

    def rebuild_sentinel(self, primary: Endpoint) -> None:
        """Put the file of a sentinel that has ended aside, and write one that has this primary and nothing else."""
        owner, file = programs.owner_of(self._config, Service.SENTINEL), self._file(Service.SENTINEL)
        owner.do(lambda: _put_aside(file))
        self._render_sentinel(owner, primary)

    def _render_sentinel(self, owner: Owner, primary: Endpoint) -> None:
        directory = self._paths.service_dir(Service.SENTINEL)
        text = render.sentinel_conf(self._config, self._node, self._secrets, directory, primary)
        write_private(self._file(Service.SENTINEL), text.encode(), owner)

    def write_tls(self) -> None:
        """Give stunnel the bundle's certificate, key and authority."""
        owner = programs.owner_of(self._config, Service.STUNNEL)
        directory = self._paths.service_dir(Service.STUNNEL)
        given = {}
        for name in TLS_FILES:
            source = self._paths.bundle_file(name)
            try:
                content = source.read_bytes()
            except OSError as error:
                remedy = "it is part of the node's bundle"
                raise SrdError("read", str(source), error.strerror or str(error), remedy) from error
            write_private(directory / name, content, owner)
            given[name] = content.decode("ascii", "replace")
        self._shown = Shown(given["tls.crt"], given["ca.crt"])

    def _write_stunnel(self, owner: Owner, _start: Start) -> None:
        self.write_tls()
        text = render.stunnel_conf(self._config, self._node, self._paths.service_dir(Service.STUNNEL))
        write_private(self._file(Service.STUNNEL), text.encode(), owner)


def _monitors(file: Path) -> bool:
    """Whether sentinel's file says whom to watch; with an empty one it would let everybody in, without a password."""
    try:
        return any(line.startswith(b"sentinel monitor ") for line in file.read_bytes().splitlines())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SrdError("read", str(file), error.strerror or str(error)) from error


def _put_aside(file: Path) -> bool:
    """Rename a file for whoever wants to look into it; return False if there is none."""
    try:
        file.replace(file.with_name(file.name + FORMER_SUFFIX))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SrdError("put aside", str(file), error.strerror or str(error)) from error
    return True
