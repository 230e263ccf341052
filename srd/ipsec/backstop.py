"""The second net, outside XFRM: packets to and from a peer that no policy has transformed are dropped.

It holds when somebody flushes the policies themselves (`ip xfrm policy flush` opened a host to plaintext in 5 of 5
pings; with this, 0 of 5), and until srd has put them back. It says the same as the policies, in netfilter's words:
protected ports first, then the exemptions, then everything. ESP passes on its way out and in; what was inside it meets
these rules again, transformed.

nftables where the kernel has it, in a table of its own that is replaced whole. Elsewhere chains of its own in the table
`filter` by iptables-restore, which is as atomic, and a jump to each. Nothing of anybody else is touched.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from srd.config import KEYING_CLIENT_PORTS, KEYING_PORT, Config, Node
from srd.desired import NEIGHBOUR_DISCOVERY_TYPES, leg_addresses
from srd.ipsec.policies import KEYING_MARK
from srd.model import IpAddress, IpsecMode, SrdError
from srd.state import Backstop, Store

log = structlog.get_logger(__name__)

PROGRAM_SECONDS: Final = 30.0
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_CLIENTS: Final = (KEYING_CLIENT_PORTS.start, KEYING_CLIENT_PORTS.stop - 1)


class BackstopError(SrdError):
    """A program that keeps netfilter's rules failed."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What is to be guarded: address pairs, the ports that nothing exempts, and what may pass in plaintext."""

    pairs: tuple[tuple[IpAddress, IpAddress], ...]
    protected: tuple[int, ...]
    bypass: tuple[tuple[str, int], ...]

    def of(self, version: int) -> tuple[tuple[IpAddress, IpAddress], ...]:
        """Return the pairs of one IP family."""
        return tuple(pair for pair in self.pairs if pair[0].version == version)


def scope_of(config: Config, node: Node) -> Scope:
    """Return what the second net of a node guards: the pairs that `desired.rules` has policies for."""
    peers = config.peers_of(node.name) if config.ipsec.mode is IpsecMode.ESP else ()
    return Scope(
        pairs=tuple(pair for peer in peers for pair in leg_addresses(node, peer)),
        protected=(config.redis.port, config.sentinel.port),
        bypass=tuple((entry.protocol, entry.port) for entry in config.bypass),
    )


# --- nftables


def nft_script(scope: Scope) -> str:
    """Return the script that puts the table `inet srd` in the place of the one that is there, if any."""
    return "\n".join(["table inet srd", "delete table inet srd", *_nft_table(scope)]) + "\n"


NFT_REMOVAL: Final = "table inet srd\ndelete table inet srd\n"


def _nft_table(scope: Scope) -> Iterator[str]:
    yield "table inet srd {"
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        elements = ", ".join(f"{local} . {remote}" for local, remote in sorted(scope.of(version)))
        yield f"  set pairs{version} {{ type {kind} . {kind}; {f'elements = {{ {elements} }}' if elements else ''} }}"
    for way, hook, near, far in (("out", "output", "saddr", "daddr"), ("in", "input", "daddr", "saddr")):
        yield f"  chain {way} {{ type filter hook {hook} priority filter; policy accept;"
        yield f"    ip {near} . ip {far} @pairs4 goto peers_{way}"
        yield f"    ip6 {near} . ip6 {far} @pairs6 goto peers_{way}"
        yield "  }"
        yield f"  chain peers_{way} {{"
        yield from (f"    {rule}" for rule in _nft_rules(scope, way))
        yield "  }"
    yield "}"


def _nft_rules(scope: Scope, way: str) -> Iterator[str]:
    plain = "rt ipsec missing" if way == "out" else "meta ipsec missing"
    ports = ", ".join(str(port) for port in scope.protected)
    low, high = _CLIENTS
    mark = f"meta mark {KEYING_MARK} " if way == "out" else ""
    yield "meta l4proto esp accept"
    yield f"tcp sport {{ {ports} }} {plain} drop"
    yield f"tcp dport {{ {ports} }} {plain} drop"
    yield f"icmpv6 type {{ {', '.join(map(str, NEIGHBOUR_DISCOVERY_TYPES))} }} accept"
    yield f"{mark}tcp sport {KEYING_PORT} tcp dport {low}-{high} accept"
    yield f"{mark}tcp dport {KEYING_PORT} tcp sport {low}-{high} accept"
    for protocol, port in scope.bypass:
        yield f"{protocol} sport {port} accept"
        yield f"{protocol} dport {port} accept"
    yield f"{plain} drop"


# --- iptables

CHAINS: Final = {"out": ("SRD-OUT", "SRD-OUT-PEER", "OUTPUT"), "in": ("SRD-IN", "SRD-IN-PEER", "INPUT")}


def iptables_script(scope: Scope, version: int, jumps: Sequence[str]) -> str:
    """Return what iptables-restore --noflush is given for one family: it fills the chains anew, in one step.

    `jumps` names the built-in chains that do not lead to srd's yet.
    """
    lines = ["*filter"]
    lines += [f":{chain} - [0:0]" for own in CHAINS.values() for chain in own[:2]]
    for way, (guard, peers, builtin) in CHAINS.items():
        near, far = ("-s", "-d") if way == "out" else ("-d", "-s")
        lines += [f"-A {guard} {near} {local} {far} {remote} -j {peers}" for local, remote in sorted(scope.of(version))]
        lines += [f"-A {peers} {rule}" for rule in _iptables_rules(scope, version, way)]
        if builtin in jumps:
            lines.append(f"-I {builtin} 1 -j {guard}")
    return "\n".join([*lines, "COMMIT"]) + "\n"


def iptables_removal(jumps: Sequence[str]) -> str:
    """Return what takes srd's chains away; `jumps` names the built-in chains that lead to them."""
    lines = ["*filter"]
    lines += [f"-D {builtin} -j {guard}" for guard, _, builtin in CHAINS.values() for _ in range(jumps.count(builtin))]
    lines += [f"-F {chain}" for own in CHAINS.values() for chain in own[:2]]
    lines += [f"-X {chain}" for own in CHAINS.values() for chain in own[:2]]
    return "\n".join([*lines, "COMMIT"]) + "\n"


def _iptables_rules(scope: Scope, version: int, way: str) -> Iterator[str]:
    plain = f"-m policy --dir {way} --pol none"
    low, high = _CLIENTS
    mark = f"-m mark --mark {KEYING_MARK} " if way == "out" else ""
    yield "-p esp -j RETURN"
    for port in scope.protected:
        yield f"-p tcp --sport {port} {plain} -j DROP"
        yield f"-p tcp --dport {port} {plain} -j DROP"
    if version == 6:  # noqa: PLR2004 - IP version
        yield from (f"-p ipv6-icmp --icmpv6-type {kind} -j RETURN" for kind in NEIGHBOUR_DISCOVERY_TYPES)
    yield f"{mark}-p tcp --sport {KEYING_PORT} --dport {low}:{high} -j RETURN"
    yield f"{mark}-p tcp --dport {KEYING_PORT} --sport {low}:{high} -j RETURN"
    for protocol, port in scope.bypass:
        yield f"-p {protocol} --sport {port} -j RETURN"
        yield f"-p {protocol} --dport {port} -j RETURN"
    yield f"{plain} -j DROP"


# --- what keeps the rules


class Keeper(Protocol):
    """One of the two ways to keep rules."""

    name: str

    async def observe(self) -> str:
        """Return srd's rules as they are, in the program's words, without counters; "" when there are none."""

    async def replace(self, scope: Scope) -> None:
        """Put the rules for `scope` in their place."""

    async def remove(self) -> None:
        """Take all that is srd's away."""


class Nftables:
    """The table `inet srd`."""

    name = "nftables"

    def __init__(self, program: str) -> None:
        self._program = program

    async def usable(self) -> bool:
        """Whether the kernel takes such a table: `nft --check` goes through all of it but the commit."""
        return (await _run(self._program, "--check", "-f", "-", text=nft_script(Scope((), (1,), ())))).status == 0

    async def observe(self) -> str:
        """Return the table; "" when there is none."""
        listed = await _run(self._program, "--stateless", "list", "table", "inet", "srd")
        return listed.output if listed.status == 0 else ""

    async def replace(self, scope: Scope) -> None:
        """Replace the table whole, in one transaction."""
        (await _run(self._program, "-f", "-", text=nft_script(scope))).check()

    async def remove(self) -> None:
        """Delete the table."""
        (await _run(self._program, "-f", "-", text=NFT_REMOVAL)).check()


class Iptables:
    """Chains in the table `filter` of both families. `suffix` is "-legacy" for the kernel's older interface, or ""."""

    def __init__(self, programs: dict[int, str], suffix: str) -> None:
        self._programs = programs  # family -> iptables or ip6tables
        self._suffix = suffix
        self.name = f"iptables{suffix}"

    async def usable(self) -> bool:
        """Whether the kernel takes rules that ask for a policy."""
        for family, program in self._programs.items():
            text = iptables_script(Scope((), (1,), ()), family, ())
            if (await _run(f"{program}{self._suffix}-restore", "--noflush", "--test", text=text)).status:
                return False
        return True

    async def observe(self) -> str:
        """Return the chains and the jumps to them."""
        found = [f"{family} {line}" for family in self._programs for line in await self._lines(family)]
        return "\n".join(found)

    async def replace(self, scope: Scope) -> None:
        """Fill the chains anew, one family after the other, and lead to them first of all."""
        for family in self._programs:
            missing = [builtin for _, _, builtin in CHAINS.values() if builtin not in await self._jumps(family)]
            await self._restore(family, iptables_script(scope, family, missing))

    async def remove(self) -> None:
        """Delete jumps and chains."""
        for family in self._programs:
            if await self._lines(family):
                await self._restore(family, iptables_removal(await self._jumps(family)))

    async def _restore(self, family: int, text: str) -> None:
        (await _run(f"{self._programs[family]}{self._suffix}-restore", "--noflush", text=text)).check()

    async def _lines(self, family: int) -> list[str]:
        saved = await _run(f"{self._programs[family]}{self._suffix}-save", "-t", "filter")
        saved.check()
        # `:CHAIN POLICY [packets:bytes]`: without the counters.
        lines = [line.partition(" [")[0] for line in saved.output.splitlines()]
        return [line for line in lines if "SRD-OUT" in line or "SRD-IN" in line]

    async def _jumps(self, family: int) -> list[str]:
        """Return the built-in chains that lead to srd's, as often as they do."""
        leads = {f"-A {builtin} -j {guard}": builtin for guard, _, builtin in CHAINS.values()}
        return [leads[line] for line in await self._lines(family) if line in leads]


@dataclass(frozen=True, slots=True)
class _Ended:
    """A program that has ended: its status, what it printed, and what it complained of."""

    command: str
    status: int
    output: str
    complaint: str

    def check(self) -> None:
        """Raise `BackstopError` if it failed."""
        if self.status:
            reason = self.complaint.strip().partition("\n")[0] or f"status {self.status}"
            raise BackstopError("keep the second net by", self.command, reason)


async def _run(program: str, *arguments: str, text: str = "") -> _Ended:
    path = shutil.which(program, path=_SYSTEM_PATH)
    if path is None:
        return _Ended(program, 127, "", "there is no such program")
    process = await asyncio.create_subprocess_exec(
        path,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": _SYSTEM_PATH, "LC_ALL": "C.UTF-8"},
    )
    try:
        async with asyncio.timeout(PROGRAM_SECONDS):
            output, complaint = await process.communicate(text.encode())
    except TimeoutError:
        raise BackstopError("keep the second net by", program, f"it took longer than {PROGRAM_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
        status = await process.wait()
    return _Ended(program, status, output.decode(errors="replace"), complaint.decode(errors="replace"))


async def find_keeper() -> Keeper | None:
    """Return what keeps rules on this machine: nftables, else iptables by either interface, else nothing."""
    families = {4: "iptables", 6: "ip6tables"}
    for keeper in (Nftables("nft"), Iptables(families, "-legacy"), Iptables(families, "")):
        if await keeper.usable():
            return keeper
    return None


class SecondNet:
    """Keeps the rules as they were put: what somebody changes or takes away is put back."""

    def __init__(self, *, config: Config, node: Node, store: Store) -> None:
        self._node = node
        self._scope = scope_of(config, node)
        self._write = store.writer("backstop")
        self._keeper: Keeper | None = None
        self._looked = False
        self._as_put: str | None = None  # how the program shows the rules that stand; None: nobody knows yet
        self._mended = 0

    def adopt(self, config: Config) -> None:
        """Guard what this file has policies for, from the next pass on."""
        scope = scope_of(config, self._node)
        if scope != self._scope:
            self._scope, self._as_put = scope, None

    async def reconcile(self) -> None:
        """Compare the rules with those that were put last, and put them again if they differ."""
        if not self._looked:
            self._keeper = await find_keeper()
            self._looked = True
            log.info("second net", keeper=self._keeper.name if self._keeper is not None else None)
        if self._keeper is None:
            self._write(Backstop(keeper=None, mended=0))
            return
        if self._as_put is None or await self._keeper.observe() != self._as_put:
            if self._as_put is not None:
                self._mended += 1
                log.warning("second net mended", keeper=self._keeper.name)
            await self._keeper.replace(self._scope)
            self._as_put = await self._keeper.observe()
        self._write(Backstop(keeper=self._keeper.name, mended=self._mended))
