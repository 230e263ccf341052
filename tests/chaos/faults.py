"""What can be done to the cluster: each kind of fault begins, holds while a block runs, and ends.

`NotNowError` at the beginning means that it cannot be done as things are, and that nothing was. What a fault leaves
behind, the cluster has to get over by itself.

Frames between nodes are dropped on the lab's bridge, outside of the nodes; what is inside ESP there, the ports of redis
and sentinel, in netfilter's INPUT on the node.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from chaos.world import FILLER, NotNowError, World, run

from srd.model import Service

SERVICES: Final = tuple(service.value for service in Service)
KEYING_PORT: Final = 849
PORTS: Final = {"redis": "6379", "sentinel": "26379"}
IPTABLES: Final = ("iptables-legacy", "-w", "5")
NETEM: Final = {"delay": "delay 300ms", "loss": "loss 20%", "reorder": "delay 20ms reorder 50% 50%"}
PULLED_SECONDS, PLUGGED_SECONDS = 1.5, 1.0  # of a cable that flaps


# What a fault is given: the cluster, the nodes that it hits, and which of its choices was drawn.
Hold = Callable[[World, tuple[str, ...], str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault.

    `impairs`: its victim may be of no use to the cluster meanwhile. `lasting`: bounds of how many seconds it holds.
    `nodes` is how it chooses its victims: `one` of all, some that are a `minority`, `another` than the primary, `none`.
    """

    hold: Hold
    choices: tuple[str, ...] = ("",)
    impairs: bool = True
    lasting: tuple[float, float] = (2.0, 12.0)
    nodes: str = "one"


@contextlib.contextmanager
def kill_child(world: World, victims: tuple[str, ...], service: str) -> Iterator[None]:
    """kill -9 of redis, sentinel or stunnel."""
    world.send(victims[0], world.child(victims[0], service), signal.SIGKILL)
    yield


@contextlib.contextmanager
def pause_child(world: World, victims: tuple[str, ...], service: str) -> Iterator[None]:
    """SIGSTOP of one, and SIGCONT; srd may be quicker."""
    pid = world.child(victims[0], service)
    world.send(victims[0], pid, signal.SIGSTOP)
    yield
    with contextlib.suppress(NotNowError):
        if world.child(victims[0], service) == pid:
            world.send(victims[0], pid, signal.SIGCONT)


@contextlib.contextmanager
def kill_srd(world: World, victims: tuple[str, ...], _: str) -> Iterator[None]:
    """kill -9 of srd; it is started again at the end, or at once where a service manager does that."""
    world.send(victims[0], world.srd(victims[0]), signal.SIGKILL)
    yield
    world.revive(victims[0])


@contextlib.contextmanager
def pause_srd(world: World, victims: tuple[str, ...], _: str) -> Iterator[None]:
    """SIGSTOP of srd, and SIGCONT."""
    pid = world.srd(victims[0])
    world.send(victims[0], pid, signal.SIGSTOP)
    yield
    world.send(victims[0], pid, signal.SIGCONT)


@contextlib.contextmanager
def upgrade_srd(world: World, victims: tuple[str, ...], _: str) -> Iterator[None]:
    """Have srd end alone, and another one take its place."""
    world.upgrade(victims[0])
    yield


@contextlib.contextmanager
def cut(world: World, victims: tuple[str, ...], _: str) -> Iterator[None]:
    """Pull a node's cable: peers, balancer and clients are gone."""
    world.pull(victims[0])
    yield
    world.plug(victims[0])


@contextlib.contextmanager
def flap(world: World, victims: tuple[str, ...], _: str) -> Iterator[None]:
    """Pull a node's cable and plug it in, by turns."""
    over = threading.Event()

    def turns() -> None:
        while not over.is_set():
            world.pull(victims[0])
            over.wait(PULLED_SECONDS)
            world.plug(victims[0])
            over.wait(PLUGGED_SECONDS)

    thread = threading.Thread(target=turns)
    thread.start()
    yield
    over.set()
    thread.join()


@contextlib.contextmanager
def partition(world: World, victims: tuple[str, ...], direction: str) -> Iterator[None]:
    """Let some nodes and the others not hear one another, or one side not hear the other; clients reach all."""
    others = [node for node in world.nodes if node not in victims]
    ways = {
        "from": [(near, far) for near in victims for far in others],
        "to": [(far, near) for near in victims for far in others],
    }
    pairs = ways.get(direction, ways["from"] + ways["to"])
    with dropping("partition", [f"iifname w-{source} oifname w-{target} drop" for source, target in pairs]):
        yield


@contextlib.contextmanager
def cut_keying(_: World, victims: tuple[str, ...], __: str) -> Iterator[None]:
    """Cut srd's own channel to its peers, and nothing else."""
    ways = [(way, end) for way in ("iifname", "oifname") for end in ("sport", "dport")]
    with dropping("keying", [f"{way} w-{victims[0]} tcp {end} {KEYING_PORT} drop" for way, end in ways]):
        yield


@contextlib.contextmanager
def dropping(table: str, rules: Sequence[str]) -> Iterator[None]:
    """Have the bridge obey these rules of nftables meanwhile."""
    text = "\n".join(
        [f"table bridge {table} {{ chain forward {{ type filter hook forward priority 0;", *rules, "}", "}"]
    )
    run("nft", "-f", "-", stdin=text)
    yield
    run("nft", "delete", "table", "bridge", table)


@contextlib.contextmanager
def cut_port(world: World, victims: tuple[str, ...], service: str) -> Iterator[None]:
    """Let a node's redis, or sentinel, and the other nodes not hear one another; all else does."""

    rules = [
        ("INPUT", "!", "-i", "lo", "-p", "tcp", end, PORTS[service], "-j", "DROP") for end in ("--sport", "--dport")
    ]
    for rule in rules:
        world.on(victims[0], *IPTABLES, "-A", *rule)
    yield
    for rule in rules:
        world.undo(victims[0], *IPTABLES, "-D", *rule)


@contextlib.contextmanager
def bad_wire(world: World, victims: tuple[str, ...], what: str) -> Iterator[None]:
    """Have a node's cable delay, lose or reorder what passes, either way."""
    netem = ("root", "netem", *NETEM[what].split(), "limit", "10000")
    run("tc", "qdisc", "add", "dev", f"w-{victims[0]}", *netem)
    world.on(victims[0], "tc", "qdisc", "add", "dev", "eth0", *netem)
    yield
    run("tc", "qdisc", "delete", "dev", f"w-{victims[0]}", "root")
    world.undo(victims[0], "tc", "qdisc", "delete", "dev", "eth0", "root")


@contextlib.contextmanager
def power_cut(world: World, victims: tuple[str, ...], _: str) -> Iterator[None]:
    """Cut a node's power; then boot it."""
    world.power_off(victims[0])
    yield
    world.power_on(victims[0])


@contextlib.contextmanager
def reboot(world: World, victims: tuple[str, ...], _: str) -> Iterator[None]:
    """Have a person reboot a node."""
    world.reboot(victims[0])
    yield


@contextlib.contextmanager
def jump_clock(world: World, victims: tuple[str, ...], by: str) -> Iterator[None]:
    """Have the wall clock jump, and later back."""
    world.jump(victims, int(by))
    yield
    world.jump_back(victims, int(by))


@contextlib.contextmanager
def fill_disk(world: World, victims: tuple[str, ...], _: str) -> Iterator[None]:
    """Fill the file system of a node's state."""
    world.fill(victims[0])
    yield
    world.undo(victims[0], "rm", FILLER)


@contextlib.contextmanager
def flush_xfrm(world: World, victims: tuple[str, ...], what: str) -> Iterator[None]:
    """Flush the kernel's SAs, or its policies, as somebody might who tidies up."""
    world.on(victims[0], "ip", "xfrm", what, "flush")
    yield


@contextlib.contextmanager
def switch_over(world: World, victims: tuple[str, ...], __: str) -> Iterator[None]:
    """Have a person move the primary to another node."""
    world.on(victims[0], "srd", "switchover", "--to", victims[0])
    yield


@contextlib.contextmanager
def kill_in_switchover(world: World, victims: tuple[str, ...], what: str) -> Iterator[None]:
    """kill -9 of redis or srd, of the primary or of whom it is handed to, in the milliseconds in which it is."""
    primary, victim = world.primary(), victims[0]
    if primary is None:
        raise NotNowError("nobody is primary")
    whereto = () if victim == primary else ("--to", victim)
    pid = world.srd(victim) if what == "srd" else world.child(victim, what)

    def switch() -> None:
        with contextlib.suppress(NotNowError):  # whoever is asked may be killed
            world.on(primary, "srd", "switchover", *whereto, check=False)

    switching = threading.Thread(target=switch)
    switching.start()
    while not (handed := b"handed_over" in world.get(primary, "/primary")[1]) and switching.is_alive():
        pass
    if not handed:
        raise NotNowError("it was refused")
    try:
        world.send(victim, pid, signal.SIGKILL)
        yield
        if what == "srd":
            world.revive(victim)
    finally:
        switching.join()


_AT_ONCE: Final = (0.0, 0.0)

# Where nodes share a kernel, and with it the clock.
KINDS: Final = {
    # redis twice: it is what all is about.
    "kill": Kind(kill_child, (*SERVICES, "redis"), lasting=_AT_ONCE),
    "pause": Kind(pause_child, (*SERVICES, "redis")),
    "kill srd": Kind(kill_srd),
    "pause srd": Kind(pause_srd),
    "upgrade srd": Kind(upgrade_srd, lasting=_AT_ONCE),
    "cut": Kind(cut),
    "flap": Kind(flap),
    "partition": Kind(partition, ("both", "both", "from", "to"), nodes="minority"),
    "cut keying channel": Kind(cut_keying),
    "cut port": Kind(cut_port, tuple(PORTS)),
    "bad wire": Kind(bad_wire, tuple(NETEM), impairs=False),
    "power cut": Kind(power_cut),
    "clock jump": Kind(jump_clock, ("-3600", "-30", "-5", "+5", "+30", "+3600"), impairs=False, nodes="none"),
    "fill disk": Kind(fill_disk),
    "flush xfrm": Kind(flush_xfrm, ("state", "policy"), impairs=False, lasting=_AT_ONCE),
    "switchover": Kind(switch_over, impairs=False, lasting=_AT_ONCE, nodes="another"),
    # With the 2 to 3 s until it hands over.
    "kill in switchover": Kind(kill_in_switchover, ("redis", "srd"), lasting=(5.0, 14.0)),
}

# Where each has its own, and a service manager. Whatever there is by name is here.
MACHINE_KINDS: Final = KINDS | {
    "clock jump": Kind(jump_clock, KINDS["clock jump"].choices),
    "reboot": Kind(reboot, lasting=_AT_ONCE),
}
