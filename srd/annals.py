"""The history of the changes of primary on disk: one file in the state directory, replaced as a whole."""

from __future__ import annotations

from typing import Final

import structlog

from srd.ha import history
from srd.ha.history import History
from srd.model import Paths
from srd.supervise.files import write_private

log = structlog.get_logger(__name__)

FILE_NAME: Final = "history.json"
ASIDE_SUFFIX: Final = ".unreadable"


class Annals:
    """Reads the history and writes it. Both block for the disk."""

    def __init__(self, paths: Paths, cluster: str) -> None:
        self._path = paths.state_dir / FILE_NAME
        self._cluster = cluster

    def load(self) -> History:
        """Return what an earlier srd has written; what cannot be read is moved aside, and a new history begins."""
        try:
            return history.decode(self._cluster, self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            self._put_aside(str(error))
            return ()

    def _put_aside(self, reason: str) -> None:
        aside = self._path.with_name(FILE_NAME + ASIDE_SUFFIX)
        try:
            self._path.replace(aside)
        except OSError as error:
            log.warning("the history is not known", file=str(self._path), reason=reason, left=error.strerror)
        else:
            log.warning("the history is not known; a new one begins", reason=reason, moved_to=str(aside))

    def save(self, changes: History) -> None:
        """Replace the file; `SrdError` when it cannot be written, and then the former one is still there."""
        write_private(self._path, history.encode(self._cluster, changes))
