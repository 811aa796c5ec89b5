"""Every parser of what comes from outside, each with valid inputs to begin from."""

import targets_data
import targets_runs
import targets_words
from engine import Target

TARGETS: dict[str, Target] = targets_runs.TARGETS | targets_data.TARGETS | targets_words.TARGETS
