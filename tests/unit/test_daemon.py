"""What of the daemon's start and of what it is asked is pure, or nearly."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clusters import cluster_toml, make_bundles, paths_of

from srd import closing
from srd.actions import seconds_of
from srd.model import SrdError


@pytest.mark.parametrize("text", ["", "abc", "nan", "inf", "-1", "1e9"])
def test_a_time_to_wait_is_a_number_within_bounds(text: str) -> None:
    with pytest.raises(SrdError, match="not a number of seconds from 0 to 86400"):
        seconds_of(text)


def test_the_last_good_file_is_kept_and_a_bad_one_or_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    make_bundles(tmp_path, cluster_toml())
    paths = paths_of(tmp_path, "redis-1")
    paths.state_dir.mkdir(parents=True)
    closing.remember(paths)
    kept = paths.last_good_file.read_text()
    assert kept == paths.cluster_file.read_text()
    paths.cluster_file.write_text(kept[:100])
    closing.remember(paths)
    assert paths.last_good_file.read_text() == kept
    paths.cluster_file.write_text(kept + "\n# another\n")
    paths.last_good_file.unlink()
    paths.last_good_file.mkdir()  # nothing can be put in its place
    closing.remember(paths)
