"""Shared by extraction and scoring: making missing parts on an executor, and counting outcomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vaemo.parts.index import Entry, Index
from vaemo.parts.tally import Tally
from vaemo.pipeline.executors import Executor, Parts
from vaemo.pipeline.plan import Plan
from vaemo.progress import Progress, say


@dataclass(frozen=True)
class Outcome:
    """Counts of all outcomes in an output folder.

    Attributes:
        out: The folder.
        utterances: How many have each status.
        sessions: How many there are (`all`), and of these `failed`, `silent` and `changed`.
        failed_fraction: Failed utterances, as a share of those that could be used or have failed.
        audio_s: Speech, in seconds.
        changed: Ids of sessions whose input has changed and whose rows were kept.
    """

    out: str
    utterances: Mapping[str, int] = field(default_factory=dict)
    sessions: Mapping[str, int] = field(default_factory=dict)
    failed_fraction: float = 0.0
    audio_s: float = 0.0
    changed: Sequence[str] = ()

    @staticmethod
    def of(out: str, tally: Tally) -> Outcome:
        """The counts of a folder."""
        return Outcome(out, **tally.to_dict(), changed=tuple(tally.changed))


def make_parts(
    parts: Parts,
    plan: Plan,
    index: Index,
    executor: Executor,
    progress: Progress,
    detail: Callable[[Tally, float], str],
) -> Tally:
    """Make the parts of a plan, with one line of progress; counts of the whole folder.

    Args:
        parts: What workers make, which return `units` and `part`, the fields of an `Entry`, and perhaps
            `n_unused_turns`, as `Batch` has it.
        plan: Whose shards they are.
        index: Of the folder, told of every part.
        executor: Where the parts are made.
        progress: Shows the units; closed at the end.
        detail: Words of its line, from the counts of this run and its seconds.

    Raises:
        VaemoError: what a worker raised first; what is finished is kept.
    """
    tally, now, n_unused = plan.tally_of(index), Tally(), 0
    for made in executor.run(parts):
        counts = index.add(Entry(**made["part"]))
        tally.add(counts)
        now.add(counts)
        n_unused += made.get("n_unused_turns", 0)
        progress.advance(made["units"], lambda elapsed_s: detail(now, elapsed_s))
    progress.close()
    if n_unused:
        say(
            f"--voices-from: {n_unused:,} recordings have several channels, and turns that name none of them, which "
            "are not used; an RTTM with channel 1 alone names none. Give the channel of every turn."
        )
    return tally
