"""How far a node's data has come, and whose has come further. Pure.

A node notes, on its own disk, the epoch of the primary whose stream it has, the replication id of that stream and how
many bytes of it: it is a replica in step of the one whom the sentinels name, or that one itself. Redis with an
append-only file has forgotten all of that after a restart. Beside it, which file redis appended to and how long all
its files were: what a power cut has taken from the disk shows by that.

Which of two has more, by the first of these that says it:
1. Who has any data: a newcomer has none, whatever its redis has made of its empty directory.
2. The greater epoch: its data is of a primary that was elected later, and began with what a majority let be chosen.
3. The end of one's append-only file stands in the other's, and something follows it there.
4. Who has noted an epoch at all.
5. The offset in one and the same stream, and what the files have grown or lost since it was noted.
If none does, it is not known: then it is whom the sentinels name, and otherwise the first one of cluster.toml.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Final

from srd.model import Body, Endpoint, Role, SrdError
from srd.state import PeerReport, Situation

UNKNOWN_EPOCH: Final = -1  # before any: it has never been in step, as far as is known
# How old a note of the same stream may get. Another epoch or stream is noted at once.
NOTE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What a redis has: up to which `offset` of the stream `replid`, of a primary of that `epoch`.

    `log`, `inode` and `size` are of its files at that time: the last one that it appended to, and the bytes of all.
    """

    epoch: int = UNKNOWN_EPOCH
    replid: str = ""
    offset: int = 0
    log: str = ""
    inode: int = 0
    size: int = 0

    def continues(self, former: Progress | None) -> bool:
        """Whether it is of the same stream as the former note."""
        return former is not None and (self.epoch, self.replid) == (former.epoch, former.replid)

    def on_disk(self, log: str, inode: int, size: int) -> Progress:
        """Return how far it has come by the files that there are: longer or shorter than they were by what was written.

        A stream has more in it than what is appended, as pings, so this is a little less than what a later note says.
        Files that are others say nothing of it, but for those that redis has gone on with: it counts them.
        """
        if (log, inode) == (self.log, self.inode):
            return replace(self, offset=max(0, self.offset + size - self.size))
        return self if number_of(log) > number_of(self.log) else Progress()


def number_of(log: str) -> int:
    """Return the number in `appendonly.aof.12.incr.aof`; 0 where there is none."""
    words = [word for word in log.split(".") if word.isdigit()]
    return int(words[0]) if words else 0


def seen(s: Situation, former: Progress | None) -> Progress | None:
    """Return how far this node's redis has come by what it says now; None if it does not say it."""
    redis, lease = s.view.redis, s.view.lease
    if redis is None or redis.loading or not redis.replid:
        return None
    known = former is not None and redis.replid == former.replid
    own = redis.role is Role.PRIMARY
    leader = s.config.node_at(redis.primary.address) if redis.primary is not None else None
    named = lease is not None and lease.primary is not None and s.config.node_at(lease.primary.address)
    if lease is not None and (redis.in_step or own) and named == (s.node if own else leader):
        return Progress(lease.epoch, redis.replid, redis.offset)
    return Progress(former.epoch, redis.replid, redis.offset) if known and former is not None else None


def leading(s: Situation, primary: Endpoint) -> PeerReport | None:
    """Return what the srd of a primary's node last said, if it said that its redis is one."""
    node = s.config.node_at(primary.address)
    report = s.view.peers.get(node.name) if node is not None else None
    return report if report is not None and report.role is Role.PRIMARY else None


def may_exceed(s: Situation, noted: Progress | None, primary: Endpoint) -> bool:
    """Return whether this node may have what that primary, as it leads now, has not.

    Not if it goes on with the stream that this node had: it is heard to lead, no other was elected, and it is further.
    """
    report = leading(s, primary)
    if noted is None or report is None or report.offset is None:
        return True
    epoch = max((a.epoch for a in s.view.sentinels.values() if a.primary == primary), default=UNKNOWN_EPOCH)
    return (epoch, report.replid) != (noted.epoch, noted.replid) or report.offset < noted.offset


@dataclass(frozen=True, slots=True)
class Stock:
    """What a node has, as it says itself. `end` are the last bytes of its append-only file, in hexadecimal.

    `able`: nothing speaks against its being primary: it is not drained, may be promoted, its redis does not fail to
    start. `ready`: its redis runs and has loaded. `chosen`: the sentinels may promote it by themselves.
    """

    node: str
    data: bool = False
    able: bool = False
    ready: bool = False
    chosen: bool = False
    epoch: int = UNKNOWN_EPOCH
    replid: str = ""
    offset: int = 0
    end: str = ""

    def body(self) -> Body:
        """Return it as an answer to another node."""
        return asdict(self)


def stock_of(node: str, body: Body) -> Stock:
    """Return what another node has answered; `SrdError` when it is not that."""
    match body:
        case {
            "data": bool(data), "able": bool(able), "ready": bool(ready), "chosen": bool(chosen),
            "epoch": int(epoch), "replid": str(replid), "offset": int(offset), "end": str(end),
        }:  # fmt: skip
            return Stock(node, data, able, ready, chosen, epoch, replid, offset, end)
    raise SrdError("understand", node, "its answer about what it has is none")


def is_ahead(theirs: Stock, mine: Stock, *, they_have_more: int | None, i_have_more: int | None) -> bool:
    """Return whether `theirs` is known to have more than `mine`.

    `they_have_more`: how many bytes stand in their append-only file after the end of mine, None if that is not in it;
    `i_have_more` the other way round.
    """
    if not theirs.data or not mine.data:
        return theirs.data
    if theirs.epoch != mine.epoch and UNKNOWN_EPOCH not in (theirs.epoch, mine.epoch):
        return theirs.epoch > mine.epoch
    if they_have_more is not None or i_have_more is not None:
        return bool(they_have_more)
    if theirs.epoch != mine.epoch:
        return theirs.epoch > mine.epoch
    return theirs.replid == mine.replid and theirs.offset > mine.offset
