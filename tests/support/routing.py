"""A router between stations of the lab, whose link to them takes smaller packets than theirs to it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from support.namespace import ip, run

NAME: Final = "router"
# Packets come in by the first port of the bridge and leave by the second, which alone has the smaller MTU: a veth drops
# what is larger than its end takes, so a router on one link would be a black hole and not a router.
INPUT, OUTPUT = f"w-{NAME}-in", f"w-{NAME}-out"
ADDRESSES: Final = {4: ("192.168.205.98", "192.168.205.99", 24), 6: ("fd00:205::98", "fd00:205::99", 64)}
TABLES: Final = {4: "iptables-legacy", 6: "ip6tables-legacy"}
# Counted one by one: ESP, the keying channel both ways; everything else falls to the chain's policy.
COUNTED: Final = (("-p", "esp"), ("-p", "tcp", "--dport", "849"), ("-p", "tcp", "--sport", "849"))


@dataclass(frozen=True)
class Router:
    """What a router of one IP family did since it has been there."""

    family: int

    def too_big(self) -> int:
        """The ICMP errors sent for packets that were too big for the next link."""
        if self.family == 6:
            return int(re.findall(r"Icmp6OutPktTooBigs\s+(\d+)", self._proc("snmp6"))[0])
        names, values = re.findall(r"IcmpMsg: (.*)", self._proc("snmp")) or ("", "")
        return int(dict(zip(names.split(), values.split(), strict=True)).get("OutType3", 0))

    def forwarded(self) -> tuple[int, int]:
        """The packets forwarded: ESP, and those that are neither ESP nor the keying channel's."""
        said = run("ip", "netns", "exec", NAME, TABLES[self.family], "-nvxL", "FORWARD")
        (others,) = re.findall(r"policy ACCEPT (\d+) packets", said)
        return int(said.splitlines()[2].split()[0]), int(others)

    def _proc(self, file: str) -> str:
        return run("ip", "netns", "exec", NAME, "cat", f"/proc/net/{file}")


@contextlib.contextmanager
def routed(ends: Mapping[str, str], mtu: int) -> Iterator[Router]:
    """Have two stations, each with its address, reach each other by a router whose next link takes `mtu` bytes."""
    (left, left_address), (right, right_address) = ends.items()
    family = 6 if ":" in left_address else 4
    with contextlib.ExitStack() as undo:
        run("ip", "netns", "add", NAME)
        undo.callback(run, "ip", "netns", "delete", NAME)  # and the links with it
        _build(family, mtu)
        for station, far in ((left, right_address), (right, left_address)):
            route = (far, "via", ADDRESSES[family][0], "dev", "eth0")
            ip(station, "route", "add", *route)
            undo.callback(ip, station, "route", "delete", *route)
        yield Router(family)


def _build(family: int, mtu: int) -> None:
    near, far, bits = ADDRESSES[family]
    settings = ["net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1"]
    for port, link, size in ((INPUT, "in", 1500), (OUTPUT, "out", mtu)):
        run("ip", "link", "add", port, "mtu", str(size), "type", "veth", "peer", "name", link, "netns", NAME)
        run("ip", "link", "set", port, "master", "br0", "up")
        ip(NAME, "link", "set", link, "mtu", str(size))
        # Both links are on the same wire: each answers for its own address alone.
        settings += [f"net/ipv4/conf/{link}/{setting}" for setting in ("arp_ignore=1", "arp_announce=2", "rp_filter=0")]
        settings += [f"net/ipv6/conf/{link}/accept_dad=0"]
    run("ip", "netns", "exec", NAME, "sysctl", "-q", "-w", *settings)
    tentative = ("nodad",) if family == 6 else ()
    for link, address in (("in", near), ("out", f"{far}/{bits}")):
        ip(NAME, "link", "set", link, "up")
        ip(NAME, "address", "add", address, "dev", link, *tentative)
    for what in COUNTED:
        run("ip", "netns", "exec", NAME, TABLES[family], "-A", "FORWARD", *what, "-j", "ACCEPT")
