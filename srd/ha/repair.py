"""Looks at what every sentinel keeps, and mends what can be mended: one sentinel at a time, never blindly.

The rules of a repair; whether 1, 3 and 4 hold is decided in ha/repairable.py.
1. Nothing is touched unless a majority of all voters answers directly (SENTINEL CKQUORUM goes on counting a lost
   sentinel for `down-after`), a majority monitors one redis node, that one answers as master, and nothing is under way.
2. What SENTINEL SET can mend is set. It changes no list and no epoch, so rule 1 is enough.
3. A sentinel that has another's id, or monitors another redis than the majority, or none, is rebuilt: the srd beside it
   puts its file aside and starts it with that primary and nothing else, so it gets an id of its own and hears the rest.
   Only if without it a majority, each by an id of its own, still answers and monitors that primary, and none of these
   is in disorder otherwise. It forgets for whom it has voted: so the srd beside it looks once more, when it is about to
   end it, that no failover is near (ha/rebuild.py). Its former id is then a ghost to the others.
4. What only SENTINEL RESET clears is reset on one sentinel, and only if, besides, no sentinel is in disorder
   (doctor.DISORDER), every redis node follows the primary, every sentinel that answers lists all the others that do and
   all replicas, and without the one to be reset a majority would still answer. So with three voters all have to answer,
   with five one may be away. (Of one or two voters all are the majority, and all must answer.)
   Why every redis node: a sentinel that has forgotten one that is away could not make it a replica when it returns.
   Why every list: then nobody else is resetting a sentinel, on another node, at this moment.
5. The next one is touched when the one that was reset has found again whoever answers, reaches the primary, has its id
   and epoch as before (one that was rebuilt has the majority's epoch), and has written its file; for that it has
   `FOUND_AGAIN_SECONDS`. A sentinel whose list is empty takes itself for a majority of one, and only its quorum keeps
   it from acting alone: that is checked before. If the primary dies just then, the others replace it, as they know of
   each other and of the replicas; it votes, too.
6. The first thing that does not come out as expected ends the repair, with what was done before.

The voters are taken in the order of the file, on whatever node that is asked for, so two repairs at once meet at the
same sentinel first, and rule 4, or for a rebuild the id that is given up, stops the later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from srd.cluster import Config, Node
from srd.findings import Cure, Finding, Trouble
from srd.ha import doctor, repairable
from srd.ha.doctor import Look
from srd.ha.patient import Account, Patient, wanted_settings
from srd.ha.rebuild import to_rebuild
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError
from srd.model import Body, RefusedError, Secrets, SrdError
from srd.reconcile import boottime

log = structlog.get_logger(__name__)

# Between the two looks that a person waits for.
LASTS_SECONDS: Final = 5.0
FOUND_AGAIN_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found, what kept it from being judged in full, and the last look."""

    findings: tuple[Finding, ...]
    unsettled: str | None
    look: Look


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair has done (or would do), in sentences, and what was found after it (before it, if it only would)."""

    done: tuple[str, ...]
    after: Examination


class Doctor:
    """Keeps `findings` of the view, and repairs. One repair at a time.

    `rebuild` has the srd of a voter rebuild its sentinel, by the words of ha/rebuild.py: `RefusedError` when it has
    not, another `SrdError` when that is not known.
    """

    def __init__(
        self,
        config: Config,
        secrets: Secrets,
        publish: Callable[[tuple[Finding, ...]], None],
        *,
        rebuild: Callable[[Node, Body], Awaitable[None]],
        lasts: float = LASTS_SECONDS,
        found_again: float = FOUND_AGAIN_SECONDS,
    ) -> None:
        self._config = config
        self._secrets = secrets
        self._publish = publish
        self._rebuild_at = rebuild
        self._lasts = lasts
        self._found_again_seconds = found_again
        self._seen: tuple[Finding, ...] = ()
        self._repairing = asyncio.Lock()

    def adopt(self, config: Config) -> None:
        """Judge by a changed file from now on."""
        self._config = config

    async def watch(self) -> None:
        """Look once, and publish what the look before has found, too."""
        found = doctor.diagnose(self._config, await self.look())
        lasting, self._seen = doctor.lasting(self._seen, found), found
        self._tell(lasting)

    def _tell(self, findings: Sequence[Finding]) -> None:
        # Who is silent, other conditions say: no_majority here, child_down there.
        self._publish(tuple(finding for finding in findings if finding.trouble is not Trouble.SILENT))

    async def look(self) -> Look:
        """Ask every voter's sentinel, and then the redis that they monitor."""
        config = self._config
        answers = await asyncio.gather(*(self._account(node) for node in config.voters))
        accounts = {answer.node: answer for answer in answers if isinstance(answer, Account)}
        silent = {
            node.name: answer.reason
            for node, answer in zip(config.voters, answers, strict=True)
            if isinstance(answer, RespError)
        }
        primary = doctor.agreed_primary(config, accounts)
        if primary is None:
            return Look(accounts, silent)
        client = RedisClient(primary, self._secrets)
        try:
            return Look(accounts, silent, await client.observe())
        except RespError:
            return Look(accounts, silent)
        finally:
            await client.close()

    async def _account(self, node: Node) -> Account | RespError:
        async with self._patient(node) as patient:
            try:
                return await patient.account()
            except RespError as error:
                return error

    @contextlib.asynccontextmanager
    async def _patient(self, node: Node) -> AsyncIterator[Patient]:
        patient = Patient(self._config, node, self._secrets)
        try:
            yield patient
        finally:
            await patient.close()

    async def examine(self) -> Examination:
        """Look twice, some seconds apart, unless the first look finds nothing."""
        look = await self.look()
        first, moving = doctor.diagnose(self._config, look), doctor.unsettled(self._config, look)
        if not first and moving is None:
            return Examination((), None, look)
        await asyncio.sleep(self._lasts)
        look = await self.look()
        second = doctor.diagnose(self._config, look)
        return Examination(doctor.lasting(first, second), doctor.unsettled(self._config, look), look)

    async def repair(self, *, dry_run: bool) -> Repair:
        """Mend what can be mended; `RefusedError` if nothing was touched, `SrdError` if it ended in the middle."""
        if self._repairing.locked():
            raise RefusedError("repair", "the sentinels", "a repair is under way")
        async with self._repairing:
            before = await self.examine()
            work = [finding for finding in before.findings if finding.cure is not Cure.BY_HAND]
            if not work:
                if before.unsettled is not None:
                    raise RefusedError("repair", "the sentinels", before.unsettled)
                return Repair((), before)
            if dry_run:
                return Repair(self._plan(before.look, work), before)
            done: list[str] = []
            try:
                await self._mend(work, done)
            except SrdError as error:
                raise _told(error, done) from error
            after = await self.examine()
            self._seen = after.findings
            self._tell(after.findings)
            return Repair(tuple(done), after)

    async def _mend(self, work: list[Finding], done: list[str]) -> None:
        for node in self._config.voters:
            await self._set(node, work, done)
        for finding in to_rebuild(work):
            await self._rebuild(finding, done)
        if any(finding.cure is Cure.REBUILD for finding in work):
            work = list((await self.examine()).findings)  # the ids that were given up, too
        elif done and any(finding.cure is Cure.RESET for finding in work):
            # Who announces itself rightly now is found without a reset.
            work = list(doctor.lasting(work, (await self.examine()).findings))
        for node in self._config.voters:
            await self._reset(node, work, done)

    def _plan(self, look: Look, findings: Sequence[Finding]) -> tuple[str, ...]:
        """Say what a repair would do, or refuse as it would."""
        repairable.require_sound(self._config, look)
        plan = []
        for node in self._config.voters:
            settings = [f.subject for f in findings if f.node == node.name and f.cure is Cure.SET]
            wanted = wanted_settings(self._config, node)
            plan += [f"set {name} of {node.name}'s sentinel to {wanted[name]}" for name in settings]
        rebuilt = to_rebuild(findings)
        for finding in rebuilt:
            repairable.require_spare(self._config, look, self._config.node(finding.node))
            plan.append(f"put {finding.node}'s sentinel.conf aside and have it begin anew: {finding.text}")
        if rebuilt:
            return (*plan, "look again then, and reset whoever still lists what is gone")
        for node in self._config.voters:
            stale = [f.subject for f in findings if f.node == node.name and f.cure is Cure.RESET]
            if stale:
                repairable.require_whole(self._config, look, node)
                plan.append(f"reset {node.name}'s sentinel, so that it forgets {', '.join(stale)}")
        return tuple(plan)

    async def _set(self, node: Node, findings: Sequence[Finding], done: list[str]) -> None:
        names = [finding.subject for finding in findings if finding.node == node.name and finding.cure is Cure.SET]
        if not names:
            return
        repairable.require_sound(self._config, await self.look())
        wanted = wanted_settings(self._config, node)
        async with self._patient(node) as patient:
            for name in names:
                await patient.set(name, wanted[name])
            settings = (await patient.account()).settings
        for name in names:
            if settings.get(name) != wanted[name]:
                reason = f"{name} is {settings.get(name)} after it was set to {wanted[name]}"
                raise SrdError("set", f"the sentinel of {node.name}", reason, "has that node another cluster.toml?")
            done.append(f"set {name} of {node.name}'s sentinel to {wanted[name]}")
            log.info("sentinel set", node=node.name, setting=name, value=wanted[name])

    async def _rebuild(self, finding: Finding, done: list[str]) -> None:
        node, look = self._config.node(finding.node), await self.look()
        repairable.require_sound(self._config, look)
        if doctor.key(finding) not in {doctor.key(found) for found in doctor.diagnose(self._config, look)}:
            return
        repairable.require_spare(self._config, look, node)
        primary = doctor.agreed_primary(self._config, look.accounts)
        log.warning("sentinel rebuilt", node=node.name, why=finding.text, primary=str(primary))
        before = look.accounts[node.name].run_id
        try:
            await self._rebuild_at(node, {"primary": str(primary), "run_id": before})
        except RefusedError:
            raise
        except SrdError:
            done.append(f"asked the srd of {node.name} to rebuild its sentinel, which did not say whether it has")
            raise
        done.append(f"put {node.name}'s sentinel.conf aside")

        def as_it_should_be(now: Account) -> str | None:
            if now.run_id == before or now.primary != str(primary):
                return f"it is {_identity(now)}"
            epoch = max(account.epoch for account in look.accounts.values() if account.primary == str(primary))
            return f"it has heard of no epoch {epoch}" if now.epoch < epoch else None

        async with self._patient(node) as patient:
            told_apart = {
                a.node: a for a in (*repairable.monitors_beside(self._config, look, node), look.accounts[node.name])
            }
            seconds = await self._whole_again(
                patient, dataclasses.replace(look, accounts=told_apart), as_it_should_be, "it was rebuilt"
            )
        done[-1] += f": its sentinel began anew, and had found all the others after {seconds:.1f} s"

    async def _reset(self, node: Node, findings: Sequence[Finding], done: list[str]) -> None:
        if not any(finding.node == node.name and finding.cure is Cure.RESET for finding in findings):
            return
        look = await self.look()
        still = {doctor.key(finding) for finding in doctor.diagnose(self._config, look)}
        stale = [f for f in findings if f.node == node.name and f.cure is Cure.RESET and doctor.key(f) in still]
        repairable.require_sound(self._config, look)
        if not stale:
            return
        repairable.require_whole(self._config, look, node)
        log.info("sentinel reset", node=node.name, to_forget=[finding.subject for finding in stale])
        async with self._patient(node) as patient:
            done.append(f"reset {node.name}'s sentinel")  # said even if the answer is lost
            await patient.reset()
            seconds = await self._found_again(patient, look, stale)
            await patient.keep()
        forgotten = ", ".join(finding.subject for finding in stale)
        done[-1] += f": it has forgotten {forgotten}, and had found all the others again after {seconds:.1f} s"

    async def _found_again(self, patient: Patient, look: Look, stale: Sequence[Finding]) -> float:
        """Return after how many seconds a sentinel that was reset is whole again; `SrdError` when it is not."""
        before, subject = _identity(look.accounts[patient.node]), f"the sentinel of {patient.node}"

        def the_same(now: Account) -> None:
            if _identity(now) != before:
                reason = f"since its reset it is {_identity(now)}; before, it was {before}"
                raise SrdError("repair", subject, reason, "srd doctor when that is over")

        def forgetful(now: Account) -> None:
            self._require_forgotten(subject, now, stale)

        return await self._whole_again(patient, look, the_same, "its reset", forgetful)

    async def _whole_again(
        self,
        patient: Patient,
        look: Look,
        objection: Callable[[Account], str | None],
        since: str,
        whole: Callable[[Account], None] = lambda _: None,
    ) -> float:
        """Return after how many seconds a sentinel has found everybody again, and there is no objection to it.

        `whole` has the last word; whatever it or `objection` raises ends the wait.
        """
        subject, began, awaited = f"the sentinel of {patient.node}", boottime(), "it does not answer"
        while boottime() - began < self._found_again_seconds:
            with contextlib.suppress(RespError):
                now = await patient.account()
                missing, wrong = doctor.not_listed(self._config, look, now), objection(now)
                if wrong is None and not missing and now.flags == {"master"}:
                    whole(now)
                    return boottime() - began
                found = f"it has not found {', '.join(missing)}" if missing else f"to it the primary is {now.flags}"
                awaited = wrong or found
            await asyncio.sleep(_POLL_SECONDS)
        raise SrdError("repair", subject, f"{self._found_again_seconds:g} s after {since} {awaited}", "srd links")

    def _require_forgotten(self, subject: str, now: Account, stale: Sequence[Finding]) -> None:
        listed = {f"{entry.run_id}@{entry.at}" for entry in now.sentinels} | set(now.replicas)
        back = [finding.subject for finding in stale if finding.subject in listed]
        if back:
            raise SrdError(
                "repair", subject, f"after its reset it has found again {', '.join(back)}", "stop what is there"
            )


def _identity(account: Account) -> str:
    """Return what a reset does not change."""
    return f"{account.run_id}, which monitors {account.primary} in epoch {account.epoch}"


def _told(error: SrdError, done: Sequence[str]) -> SrdError:
    """Return the error that ends a repair; if something was done before, it says what."""
    if not done:
        return error
    reason = f"{error.reason}; done before: {'; '.join(done)}; nothing else was touched"
    told = SrdError(error.operation, error.subject, reason, error.remedy)
    told.exit_status = error.exit_status
    return told
