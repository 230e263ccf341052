"""Whether a sentinel may be touched now, by what all of them said: rules 1, 3 and 4 of a repair (ha/repair.py). Pure.

Each function returns where the rule holds, and raises `RefusedError` with what keeps it where it does not.
"""

from __future__ import annotations

from srd.cluster import Config, Node
from srd.findings import Trouble
from srd.ha import doctor
from srd.ha.doctor import Look
from srd.ha.lease import endpoint_of
from srd.ha.patient import Account
from srd.model import RefusedError


def require_sound(config: Config, look: Look) -> None:
    """Refuse to touch anything unless rule 1 holds."""
    moving = doctor.unsettled(config, look)
    if moving is not None:
        _refuse(moving)
    if doctor.agreed_primary(config, look.accounts) is None:
        _refuse("no majority of them monitors the same redis node")


def require_spare(config: Config, look: Look, node: Node) -> None:
    """Refuse to rebuild a voter's sentinel unless rule 3 holds."""
    primary, others = doctor.agreed_primary(config, look.accounts), monitors_beside(config, look, node)
    if len(others) < config.majority:
        _refuse(f"without the sentinel of {node.name} no majority would answer and monitor {primary}")
    names = {account.node for account in others}
    for finding in doctor.diagnose(config, look):
        if finding.trouble in doctor.DISORDER - {Trouble.DUPLICATE_ID} and finding.node in names:
            _refuse(f"first mend that of {finding.node}: {finding.text}", finding.remedy)


def require_whole(config: Config, look: Look, node: Node) -> None:
    """Refuse to reset a voter's sentinel unless rule 4 holds."""
    silent = sorted(look.silent)
    if silent and len(look.accounts) - 1 < config.majority:
        _refuse(f"{', '.join(silent)} does not answer, and without {node.name} there would be no majority")
    for finding in doctor.diagnose(config, look):
        if finding.trouble in doctor.DISORDER:
            _refuse(f"first mend that of {finding.node}: {finding.text}", finding.remedy)
        if finding.trouble is Trouble.SETTING and finding.subject == "quorum":
            _refuse(f"{finding.node}: {finding.text}")
    for account in look.accounts.values():
        missing = doctor.not_listed(config, look, account)
        if missing:
            _refuse(f"the sentinel of {account.node} does not list {', '.join(missing)}")
    primary = doctor.agreed_primary(config, look.accounts)
    for other in config.redis_nodes:
        at = endpoint_of(config, other)
        if at != primary and str(at) not in look.followers:
            _refuse(
                f"{other.name} does not follow the primary; a sentinel that forgets it could not demote it later",
                "bring its redis up, or take the node out of cluster.toml",
            )


def monitors_beside(config: Config, look: Look, node: Node) -> list[Account]:
    """Return who monitors the majority's primary beside a voter; of several with one id the first."""
    primary = str(doctor.agreed_primary(config, look.accounts))
    voters = [look.accounts[v.name] for v in config.voters if v != node and v.name in look.accounts]
    found: dict[str, Account] = {}
    for account in voters:
        if account.primary == primary:
            found.setdefault(account.run_id, account)
    return list(found.values())


def _refuse(reason: str, remedy: str = "") -> None:
    raise RefusedError("repair", "the sentinels", reason, remedy)
