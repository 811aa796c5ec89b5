"""Long work says how far it is, and short work nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maelab.progress import heartbeat

SLOW = """
import time
from maelab.progress import heartbeat
beat = heartbeat("counting", 40, first=0.3)
for done in range(1, 41):
    time.sleep(0.02)
    beat(done)
"""


def test_short_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    beat = heartbeat("counting", 3)
    for done in range(4):
        beat(done)
    assert capsys.readouterr().err == ""


def test_long_work_says_how_far_it_is_and_only_the_first_process_does() -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        env = {**os.environ, "RANK": rank, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", SLOW], env=env, capture_output=True, text=True, check=True)
        said = done.stderr.splitlines()
        assert len(said) == lines
        assert not lines or re.fullmatch(r"maelab: counting: \d+ of 40, \d+/s, \d+ s left", said[0])


def test_slow_work_has_a_rate_and_long_work_hours(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr("maelab.progress.time.monotonic", lambda: now)
    beat = heartbeat("drawing", 1000)
    now = 300.0
    beat(60)
    assert capsys.readouterr().err == "maelab: drawing: 60 of 1000, 0.2/s, 1 h 18 min left\n"
    now = 400.0
    beat(800)
    assert capsys.readouterr().err == "maelab: drawing: 800 of 1000, 2.0/s, 1 min 40 s left\n"
