"""Which AEAD two nodes use, by what /proc/crypto says on machines with and without AES instructions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd.ipsec.suites import choose, grades
from srd.model import SrdError, Suite

AESNI = """name         : rfc4106(gcm(aes))
driver       : rfc4106-gcm-aesni
module       : aesni_intel

name         : sha256
driver       : sha256-generic
"""
IN_C = """name         : rfc4106(gcm(aes))
driver       : rfc4106(gcm_base(ctr(aes-generic),ghash-generic))

name         : aes
driver       : aes-aesni
"""
BEING_BUILT = """name         : rfc4106(gcm(aes))
driver       :
module       : kernel
type         : larval
"""
EVERYTHING = tuple(Suite)
GRADES = st.dictionaries(st.sampled_from(EVERYTHING), st.integers(0, 5), min_size=1)


@pytest.mark.parametrize(
    ("mine", "theirs", "suite"),
    [
        (AESNI, AESNI, Suite.AES_256_GCM),
        (AESNI, IN_C, Suite.CHACHA20_POLY1305),
        (IN_C, IN_C, Suite.CHACHA20_POLY1305),
        ("", "", Suite.CHACHA20_POLY1305),
        (BEING_BUILT, BEING_BUILT, Suite.CHACHA20_POLY1305),
        (f"{BEING_BUILT}\n{AESNI}", AESNI, Suite.AES_256_GCM),
    ],
)
def test_the_slower_end_decides(mine: str, theirs: str, suite: Suite) -> None:
    assert choose(grades(EVERYTHING, mine), grades(EVERYTHING, theirs))[0] is suite


def test_a_kernel_that_has_only_one_suite_gets_it() -> None:
    suite, why = choose(grades(EVERYTHING, IN_C), grades([Suite.AES_256_GCM], IN_C))
    assert suite is Suite.AES_256_GCM
    assert why == "AES-256-GCM is the only suite that both kernels have"


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(SrdError, match="no AEAD in common"):
        choose(grades([Suite.AES_256_GCM], ""), grades([Suite.CHACHA20_POLY1305], ""))


@given(GRADES, GRADES)
def test_both_ends_choose_the_same(mine: dict[Suite, int], theirs: dict[Suite, int]) -> None:
    if mine.keys() & theirs.keys():
        assert choose(mine, theirs)[0] is choose(theirs, mine)[0]
