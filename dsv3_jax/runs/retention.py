"""The rule by which old checkpoints are deleted."""

from __future__ import annotations

from collections.abc import Callable, Collection


def superseded(present: Collection[int], saved: int, keep: int, is_whole: Callable[[int], bool]) -> list[int]:
    """Returns the steps of the checkpoints to delete after one was saved, oldest first.

    The newest `keep` whole checkpoints stay, and so does everything newer than the oldest of them. A damaged one takes
    no place among the `keep`, and the one that was just saved is never deleted.

    Args:
      present: steps of all complete checkpoints.
      saved: step of the one that was just saved, which is whole.
      keep: number of whole checkpoints to keep, at least 1.
      is_whole: tells whether a checkpoint is undamaged; asked from the newest on, until `keep` are found.
    """
    kept = 0
    for step in sorted(present, reverse=True):
        kept += step == saved or is_whole(step)
        if kept == keep:
            return sorted(other for other in present if other < step and other != saved)
    return []
