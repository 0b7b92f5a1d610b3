"""The fault injector: what it parses, that it counts, and that it does nothing unless configured."""

import os
import re
import signal
from pathlib import Path

import pytest

from fst_fast.errors import UserError
from fst_fast.run import faults

SOURCE = Path(faults.__file__).parents[1]


@pytest.fixture(autouse=True)
def killed(monkeypatch):
    """The signals sent; disarmed afterwards."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    yield sent
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.arm()


def arm(monkeypatch, text, rank=0):
    monkeypatch.setenv(faults.VARIABLE, text)
    faults.arm(rank)


def test_the_process_is_killed_when_it_is_at_the_point_the_nth_time(monkeypatch, killed):
    arm(monkeypatch, "backward:3")
    for point in ("backward", "rollout", "backward", "optimiser"):
        faults.reach(point)
    assert killed == []
    faults.reach("backward")
    assert killed == [(os.getpid(), signal.SIGKILL)]


def test_unset_or_meant_for_another_rank_nothing_happens(monkeypatch, killed):
    for text, rank in (("", 0), ("rollout:1:1", 0), ("rollout:1:0", 1)):
        arm(monkeypatch, text, rank)
        for point in faults.POINTS:
            faults.reach(point)
    assert killed == []
    arm(monkeypatch, "rollout:1:1", rank=1)
    faults.reach("rollout")
    assert len(killed) == 1


def test_an_unknown_point_is_refused_naming_the_known_ones(monkeypatch):
    with pytest.raises(
        UserError, match=r"FST_FAULT=bakward:1: there is no point 'bakward'; known: fast\.wave, .*, summary$"
    ):
        arm(monkeypatch, "bakward:1")


@pytest.mark.parametrize(
    "text", ["rollout", "rollout:", "rollout:0", "rollout:-1", "rollout:x", "rollout:1:x", "rollout:1:1:1"]
)
def test_a_count_that_is_no_whole_number_is_refused(monkeypatch, text):
    with pytest.raises(UserError, match="allowed: POINT:N or POINT:N:RANK"):
        arm(monkeypatch, text)


def test_every_named_point_occurs_in_the_code_once():
    found = [
        name
        for path in SOURCE.rglob("*.py")
        for name in re.findall(r'\breach\("([^"]*)"\)', path.read_text())
    ]
    assert sorted(found) == sorted(faults.POINTS)
    assert len(found) >= 12
