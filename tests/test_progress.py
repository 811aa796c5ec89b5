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
