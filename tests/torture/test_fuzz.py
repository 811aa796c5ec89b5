"""Every parser of what comes from outside, fed with mutated inputs: one line of refusal, or an answer; nothing else.

100 inputs each; `make torture` feeds 10,000 each. See engine.py for the limits and for how to make an input again.
"""

from pathlib import Path

import pytest
from engine import attack
from targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_parser(name: str, tmp_path: Path) -> None:
    report = attack("targets", name, tmp_path, TARGETS[name].share)
    assert not report.faults, "\n\n".join(
        [f"{len(report.faults)} faults in {report.inputs} inputs", *report.faults[:5]]
    )
    assert report.inputs > 0
