"""Redis' data directory: what is done to it before redis starts, and the copies of it. Everything here blocks.

A failure is only logged, but for what redis itself would fail by: a replica is worth more than a copy.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Final

import structlog

from srd.cluster import Config
from srd.desired import Start
from srd.model import Paths, Service, SrdError
from srd.supervise import kept, programs
from srd.supervise.adopt import FOLLOWS_NAME
from srd.supervise.files import Owner
from srd.supervise.inventory import files_in, look
from srd.supervise.mend import cut_off_zeros, remove_unfinished
from srd.supervise.running import Former
from srd.supervise.unreadable import CHECK_SECONDS, clear, is_unreadable

log = structlog.get_logger(__name__)

# redis' checkers read a file in half the time in which redis loads it. What takes them longer than this is not judged.
LONGEST_CHECK_SECONDS: Final = 120.0


class DataDirectory:
    """That of one node's redis."""

    def __init__(self, config: Config, paths: Paths) -> None:
        self._config, self._paths = config, paths
        self._path = paths.service_dir(Service.REDIS)

    def adopt(self, config: Config) -> None:
        """Go by a changed cluster.toml."""
        self._config = config

    def prepare(self, owner: Owner, start: Start, former: Former) -> None:
        """Make it ready for a redis that starts so, after a former one that ended so; none runs there now."""
        self._mend(owner)
        if start.primary is None:
            self._keep_what_is_not_loaded(owner)
            return
        if start.keep or not (self._paths.state_dir / FOLLOWS_NAME).exists():
            self.keep()
        if start.led and former.refused_after is not None:
            self._set_aside_unreadable(owner, former.refused_after, former.given_up)

    def keep(self) -> None:
        """Keep a copy of the files, as they may be replaced."""
        try:
            owner = programs.owner_of(self._config, Service.REDIS)
            copy = owner.do(lambda: kept.keep(self._path, time.time()))
        except (OSError, SrdError) as error:
            self._warn("cannot keep a copy of redis' files", error=str(error))
            return
        if copy is not None:
            log.info("kept a copy of redis' files", directory=str(copy))

    def kept(self) -> Path | None:
        """Return the last copy of the files that was kept, if there is one that can be seen."""
        try:
            return programs.owner_of(self._config, Service.REDIS).do(lambda: kept.latest(self._path))
        except (OSError, SrdError):
            return None

    def _mend(self, owner: Owner) -> None:
        """Mend what a power cut or a kill has left; redis itself says what is wrong where that fails."""
        try:
            zeros, removed = owner.do(lambda: (cut_off_zeros(self._path), remove_unfinished(self._path)))
        except OSError as error:
            self._warn("cannot mend redis' files", error=str(error))
            return
        if zeros:
            self._warn("cut zeros off the end of redis' append-only file", bytes=zeros)
        if removed:
            log.info("removed what redis had left unfinished", directory=str(self._path), files=removed)

    def _keep_what_is_not_loaded(self, owner: Owner) -> None:
        """Keep files beside which redis is to begin as an empty primary: a snapshot without append-only files, say."""
        appends = self._config.appends
        try:
            ignored = owner.do(lambda: not look(self._path, appends=appends).data and bool(files_in(self._path)))
        except OSError as error:
            self._warn("cannot look into redis' files", error=str(error))
            return
        if ignored:
            self._warn("redis begins empty beside files that it does not load")
            self.keep()

    def _set_aside_unreadable(self, owner: Owner, refused_after: float, given_up: threading.Event) -> None:
        """Let a replica whose redis cannot read its files begin without them: it gets all from the primary."""
        try:
            found = is_unreadable(
                programs.find_program(self._config, Service.REDIS),
                owner,
                self._path,
                self._paths.log_file(Service.REDIS),
                appends=self._config.appends,
                seconds=min(CHECK_SECONDS + refused_after, LONGEST_CHECK_SECONDS),
                given_up=given_up.is_set,
            )
            if found:
                self.keep()
                self._warn("redis cannot read its files", begins_anew=owner.do(lambda: clear(self._path)))
        except (OSError, SrdError) as error:
            self._warn("cannot look into redis' files", error=str(error))

    def _warn(self, event: str, **details: object) -> None:
        log.warning(event, directory=str(self._path), **details)
