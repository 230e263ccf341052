"""The care for one child that does not answer: what is the matter with it so far, and what to do now."""

from __future__ import annotations

from collections.abc import Callable

from srd.model import Service
from srd.state import Symptom
from srd.supervise.pulse import Remedy, Silence, read_pulse, remedy
from srd.supervise.running import Timing


class Care:
    """Follows the spells of silence of a child. `symptom` is what is shown of the present one, None between them.

    `deposed` says whether it was primary and another is by now, `paused` whether a person wants nothing to be done.
    """

    def __init__(
        self, service: Service, timing: Timing, deposed: Callable[[], bool], paused: Callable[[], bool]
    ) -> None:
        self.symptom: Symptom | None = None
        self._silence: Silence | None = None
        self._hung_after = timing.hung_after
        self._slow_limit = None if service is Service.REDIS else timing.slow_limit
        self._deposed = deposed
        self._paused = paused

    def heard(self) -> None:
        """End the spell: it has answered, or has ended."""
        self._silence = self.symptom = None

    def unheard(self, pid: int, now: float, *, slow_shows: bool) -> Remedy:
        """Look at the child after one more question without an answer; return what to do.

        `now` is CLOCK_BOOTTIME seconds. That it is slow is shown only if `slow_shows`: one late answer is no symptom.
        """
        if self._silence is None:
            self._silence = Silence(now, hung_after=self._hung_after)
        symptom = self._silence.judge(read_pulse(pid), now)
        if slow_shows or symptom is not Symptom.SLOW:
            self.symptom = symptom
        seconds = now - self._silence.since
        chosen = remedy(symptom, seconds, slow_limit=self._slow_limit, deposed=self._deposed())
        # What is ended at once is no danger to itself but to the data: no pause is for that.
        return Remedy.WAIT if self._paused() and chosen is not Remedy.KILL else chosen
