"""What can be wrong with what the sentinels keep, and how it is mended; ha/doctor.py finds it. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Trouble(enum.StrEnum):
    """What is wrong with what a sentinel keeps."""

    SILENT = "silent"  # it does not answer, so nothing is known of it
    DUPLICATE_ID = "duplicate_id"
    OTHER_PRIMARY = "other_primary"
    EPOCH_TIE = "epoch_tie"  # another primary than the majority's, in the same epoch
    OLD_EPOCH = "old_epoch"
    SEES_DOWN = "sees_down"  # the primary, which answers
    SETTING = "setting"
    FURTHER_MASTER = "further_master"
    GHOST_SENTINEL = "ghost_sentinel"  # an id that a voter no longer has
    STALE_SENTINEL = "stale_sentinel"  # not a voter, and long silent
    STRANGE_SENTINEL = "strange_sentinel"  # not a voter, and it takes part
    UNKNOWN_SENTINEL = "unknown_sentinel"  # a voter that it does not list
    STALE_REPLICA = "stale_replica"  # not a redis node, and it follows nobody here
    STRANGE_REPLICA = "strange_replica"  # not a redis node, and it follows the primary


class Cure(enum.StrEnum):
    """How a finding is mended."""

    SET = "set"
    RESET = "reset"
    REBUILD = "rebuild"  # its file is put aside, and it begins with the primary that a majority names
    BY_HAND = "by_hand"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with what the sentinel of `node` keeps: on what, in one sentence, and how it is mended.

    `subject` is an address, an id or the name of a setting. `remedy` is what a person does, where srd does not.
    """

    trouble: Trouble
    node: str
    subject: str
    text: str
    cure: Cure
    remedy: str = ""
