"""The two ways in which maelab refuses or gives up, each with one line for the person who reads it."""


class MaelabError(Exception):
    """An error whose message is complete by itself: what is wrong, where, and what to do."""

    exit_status = 1


class UsageError(MaelabError):
    """What was asked for cannot be done: an unknown name, an impossible value, a missing path."""

    exit_status = 2


class RunError(MaelabError):
    """What was asked for is possible, and failed: no network, a full disk, a loss that is not a number."""

    exit_status = 1


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, of the machine or of a GPU."""
    first = (str(error).splitlines() or [""])[0]
    return isinstance(error, MemoryError) or "out of memory" in first or "can't allocate memory" in first
