"""The second net, outside XFRM: packets to and from a peer that no policy has transformed are dropped.

It holds when somebody flushes the policies themselves (`ip xfrm policy flush` opened a host to plaintext in 5 of 5
pings; with this, 0 of 5), and until srd has put them back. It says the same as the policies, in netfilter's words:
protected ports first, then the exemptions, then everything with a peer, and the protected ports with anybody else. ESP,
in UDP or not, passes on its way out and in; what was inside it meets these rules again, transformed. Later fragments of
an exempt UDP datagram do not show their ports and are dropped.

nftables where the kernel has it, in a table of its own that is replaced whole. Elsewhere chains of its own in the table
`filter` by iptables-restore, which is as atomic, and a jump to each. Nothing of anybody else is touched.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from srd.cluster import KEYING_CLIENT_PORTS, KEYING_PORT, Config, Node
from srd.desired import NEIGHBOUR_DISCOVERY_TYPES, leg_addresses
from srd.ipsec.policies import KEYING_MARK
from srd.model import PLAIN_ENVIRONMENT, SYSTEM_PATH, IpAddress, IpsecMode, SrdError
from srd.state import Backstop, Store

log = structlog.get_logger(__name__)

PROGRAM_SECONDS: Final = 30.0
_CLIENTS: Final = (KEYING_CLIENT_PORTS.start, KEYING_CLIENT_PORTS.stop - 1)


class BackstopError(SrdError):
    """A program that keeps netfilter's rules failed."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What is to be guarded: address pairs, the ports that nothing exempts, and what may pass in plaintext."""

    pairs: tuple[tuple[IpAddress, IpAddress], ...]
    protected: tuple[int, ...]
    bypass: tuple[tuple[str, int], ...]
    udp_ports: tuple[int, ...] = ()  # of ESP in UDP

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
        udp_ports=config.udp_ports,
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
        yield f"    {'oif' if way == 'out' else 'iif'} != lo jump outsiders_{way}"
        yield "  }"
        yield f"  chain outsiders_{way} {{"
        yield from (f"    {rule}" for rule in _nft_protected(scope, way))
        yield "  }"
        yield f"  chain peers_{way} {{"
        yield from (f"    {rule}" for rule in _nft_rules(scope, way))
        yield "  }"
    yield "}"


_NFT_PLAIN: Final = {"out": "rt ipsec missing", "in": "meta ipsec missing"}


def _nft_protected(scope: Scope, way: str) -> Iterator[str]:
    ports = ", ".join(str(port) for port in scope.protected)
    for end in ("sport", "dport"):
        yield f"tcp {end} {{ {ports} }} {_NFT_PLAIN[way]} drop"


def _nft_rules(scope: Scope, way: str) -> Iterator[str]:
    low, high = _CLIENTS
    mark = f"meta mark {KEYING_MARK} " if way == "out" else ""
    yield "meta l4proto esp accept"
    yield from _nft_protected(scope, way)
    yield f"icmpv6 type {{ {', '.join(map(str, NEIGHBOUR_DISCOVERY_TYPES))} }} accept"
    yield f"{mark}tcp sport {KEYING_PORT} tcp dport {low}-{high} accept"
    yield f"{mark}tcp dport {KEYING_PORT} tcp sport {low}-{high} accept"
    yield from (f"udp sport {port} udp dport {port} accept" for port in scope.udp_ports)
    for protocol, port in scope.bypass:
        yield f"{protocol} sport {port} accept"
        yield f"{protocol} dport {port} accept"
    yield f"{_NFT_PLAIN[way]} drop"


# --- iptables

CHAINS: Final = {"out": ("SRD-OUT", "SRD-OUT-PEER", "OUTPUT"), "in": ("SRD-IN", "SRD-IN-PEER", "INPUT")}


def iptables_script(scope: Scope, version: int, jumps: Sequence[str]) -> str:
    """Return what iptables-restore --noflush is given for one family: it fills the chains anew, in one step.

    `jumps` names the built-in chains that lead to srd's, as often as they do; afterwards each does once, first of all.
    """
    lines = ["*filter"]
    lines += [f":{chain} - [0:0]" for own in CHAINS.values() for chain in own[:2]]
    lines += _jumps_removed(jumps)
    for way, (guard, peers, builtin) in CHAINS.items():
        near, far = ("-s", "-d") if way == "out" else ("-d", "-s")
        lines += [f"-A {guard} {near} {local} {far} {remote} -j {peers}" for local, remote in sorted(scope.of(version))]
        outside = "! -o lo" if way == "out" else "! -i lo"
        # A peer's packets that may pass come back from the chain of peers: none of these is to a protected port.
        lines += [f"-A {guard} {outside} {rule}" for rule in _iptables_protected(scope, way)]
        lines += [f"-A {peers} {rule}" for rule in _iptables_rules(scope, version, way)]
        lines.append(f"-I {builtin} 1 -j {guard}")
    return "\n".join([*lines, "COMMIT"]) + "\n"


def iptables_removal(jumps: Sequence[str]) -> str:
    """Return what takes srd's chains away; `jumps` names the built-in chains that lead to them."""
    lines = ["*filter", *_jumps_removed(jumps)]
    lines += [f"-F {chain}" for own in CHAINS.values() for chain in own[:2]]
    lines += [f"-X {chain}" for own in CHAINS.values() for chain in own[:2]]
    return "\n".join([*lines, "COMMIT"]) + "\n"


def _jumps_removed(jumps: Sequence[str]) -> list[str]:
    return [f"-D {builtin} -j {guard}" for guard, _, builtin in CHAINS.values() for _ in range(jumps.count(builtin))]


def _iptables_protected(scope: Scope, way: str) -> Iterator[str]:
    for port in scope.protected:
        for end in ("--sport", "--dport"):
            yield f"-p tcp {end} {port} -m policy --dir {way} --pol none -j DROP"


def _iptables_rules(scope: Scope, version: int, way: str) -> Iterator[str]:
    low, high = _CLIENTS
    mark = f"-m mark --mark {KEYING_MARK} " if way == "out" else ""
    yield "-p esp -j RETURN"
    yield from _iptables_protected(scope, way)
    if version == 6:  # noqa: PLR2004 - IP version
        yield from (f"-p ipv6-icmp --icmpv6-type {kind} -j RETURN" for kind in NEIGHBOUR_DISCOVERY_TYPES)
    yield f"{mark}-p tcp --sport {KEYING_PORT} --dport {low}:{high} -j RETURN"
    yield f"{mark}-p tcp --dport {KEYING_PORT} --sport {low}:{high} -j RETURN"
    yield from (f"-p udp --sport {port} --dport {port} -j RETURN" for port in scope.udp_ports)
    for protocol, port in scope.bypass:
        yield f"-p {protocol} --sport {port} -j RETURN"
        yield f"-p {protocol} --dport {port} -j RETURN"
    yield f"-m policy --dir {way} --pol none -j DROP"


# --- what keeps the rules


class Keeper(Protocol):
    """One of the two ways to keep rules."""

    name: str

    async def observe(self) -> str:
        """Return srd's rules as they are, in the program's words, without counters; "" when there are none."""

    async def replace(self, scope: Scope) -> None:
        """Put the rules for `scope` in their place."""

    async def remove(self) -> None:
        """Take all that is srd's away, if there is anything."""


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

    def __init__(self, programs: Mapping[int, str], suffix: str) -> None:
        self._programs = dict(programs)  # family -> iptables or ip6tables
        self._suffix = suffix
        self.name = f"iptables{suffix}"

    async def usable(self) -> bool:
        """Whether the kernel takes rules that ask for a policy; of a family that it does not have, none are kept."""
        for family, program in list(self._programs.items()):
            text = iptables_script(Scope((), (1,), ()), family, ())
            if (await _run(f"{program}{self._suffix}-restore", "--noflush", "--test", text=text)).status:
                del self._programs[family]
        return bool(self._programs)

    async def observe(self) -> str:
        """Return the chains and the jumps to them."""
        found = [f"{family} {line}" for family in self._programs for line in await self._lines(family)]
        return "\n".join(found)

    async def replace(self, scope: Scope) -> None:
        """Fill the chains anew, one family after the other, and lead to them first of all."""
        for family in self._programs:
            jumps = _jumps_in(await self._lines(family))
            await self._restore(family, iptables_script(scope, family, jumps))

    async def remove(self) -> None:
        """Delete jumps and chains."""
        for family in self._programs:
            if lines := await self._lines(family):
                await self._restore(family, iptables_removal(_jumps_in(lines)))

    async def _restore(self, family: int, text: str) -> None:
        (await _run(f"{self._programs[family]}{self._suffix}-restore", "--noflush", text=text)).check()

    async def _lines(self, family: int) -> list[str]:
        saved = await _run(f"{self._programs[family]}{self._suffix}-save", "-t", "filter")
        saved.check()
        # `:CHAIN POLICY [packets:bytes]`: without the counters.
        lines = [line.partition(" [")[0] for line in saved.output.splitlines()]
        # The first rule of each built-in chain, whoever's it is: one that stands before the jump could let all pass.
        first = [next((line for line in lines if line.startswith(f"-A {own[2]} ")), "") for own in CHAINS.values()]
        own = [line for line in lines if "SRD-OUT" in line or "SRD-IN" in line]
        return [*(f"first: {line}" for line in first), *own] if own else []


def _jumps_in(lines: Iterable[str]) -> list[str]:
    """Return the built-in chains that lead to srd's, as often as they do."""
    leads = {f"-A {builtin} -j {guard}": builtin for guard, _, builtin in CHAINS.values()}
    return [leads[line] for line in lines if line in leads]


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
    path = shutil.which(program, path=SYSTEM_PATH)
    if path is None:
        return _Ended(program, 127, "", "there is no such program")
    process = await asyncio.create_subprocess_exec(
        path,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=PLAIN_ENVIRONMENT,
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


async def usable_keepers() -> list[Keeper]:
    """Return what can keep rules on this machine, the best first: nftables, then iptables by either interface."""
    families = {4: "iptables", 6: "ip6tables"}
    keepers = (Nftables("nft"), Iptables(families, "-legacy"), Iptables(families, ""))
    return [keeper for keeper in keepers if await keeper.usable()]


class SecondNet:
    """Keeps the rules as they were put: what somebody changes or takes away is put back."""

    def __init__(self, *, config: Config, node: Node, store: Store) -> None:
        self._node = node
        self._scope = scope_of(config, node)
        self._write = store.writer("backstop")
        self._keepers: list[Keeper] | None = None  # None: nobody has looked yet
        self._put: tuple[Scope, str] | None = None  # what was put, and how the program shows it
        self._mended = 0
        self._one_pass = asyncio.Lock()

    def adopt(self, config: Config) -> None:
        """Guard what this file has policies for, from the next pass on."""
        self._scope = scope_of(config, self._node)

    async def reconcile(self) -> None:
        """Compare the rules with those that were put last, and put them again if they differ."""
        async with self._one_pass:
            await self._pass()

    async def _pass(self) -> None:
        if self._keepers is None:
            self._keepers = await usable_keepers()
            log.info("second net", keeper=self._keepers[0].name if self._keepers else None)
        if not self._keepers:
            self._write(Backstop(keeper=None, mended=0))
            return
        keeper, *others = self._keepers
        try:
            await self._keep(keeper, others)
        except BackstopError:
            self._write(Backstop(keeper=None, mended=self._mended))
            raise
        self._write(Backstop(keeper=keeper.name, mended=self._mended))

    async def _keep(self, keeper: Keeper, others: Sequence[Keeper]) -> None:
        scope, put = self._scope, self._put
        if put is not None and put[0] == scope:
            if await keeper.observe() == put[1]:
                return
            self._mended += 1
            log.warning("second net mended", keeper=keeper.name)
        await keeper.replace(scope)
        if put is None:
            for other in others:
                await other.remove()  # what an earlier srd kept in another way
        self._put = (scope, await keeper.observe())
