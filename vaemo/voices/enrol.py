"""The command `enrol`: recordings of persons, a folder or a file each, to a file of voiceprints.

Reads `FOLDER/PERSON/*.wav` or `FOLDER/PERSON.wav`, finds the speech in them, and writes what `--speakers` of
`jobs/score.py` takes. Persons who are there already are replaced, others stay; `--erase` removes one.
"""

from __future__ import annotations

import argparse
import datetime
import os
import posixpath
from collections.abc import Sequence

import numpy as np

from vaemo import cli, files
from vaemo.audio.archive import list_recordings, shown
from vaemo.audio.recording import AudioProblem, Decoder, Recording
from vaemo.audio.vad import UtteranceFinder
from vaemo.config import Config
from vaemo.data.speakers import unit
from vaemo.errors import ReadVoicesError, UsageError, named
from vaemo.features import campplus
from vaemo.progress import say
from vaemo.units import SAMPLING_RATE_HZ
from vaemo.voices.prints import Voiceprints

LEAST_S = 10.0
"""Least speech to enrol a person from."""

_ALIKE = 0.5
"""Least similarity of two recordings of one person; below it a warning is printed."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse arguments, write the file."""
    parser = cli.Parser(
        prog=prog, description="Turn recordings of persons into voiceprints, by which calls tell the agent's voice."
    )
    parser.add_argument("folder", nargs="?", type=cli.data_path, metavar="FOLDER", help="PERSON/*.wav or PERSON.wav")
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="FILE", help="Parquet; is added to")
    parser.add_argument("--role", default="agent", help="what these persons are in calls (default: agent)")
    parser.add_argument("--expires", type=_day, metavar="DATE", help="last day on which they may be used: 2027-01-31")
    parser.add_argument("--channel", type=_channel, metavar="N", help="from 0, of recordings with several channels")
    parser.add_argument(
        "--erase", action="append", default=[], metavar="PERSON", help="remove a person; may be repeated"
    )
    args = parser.parse_args(argv)
    if not args.folder and not args.erase:
        raise UsageError("give a FOLDER of recordings to enrol, or --erase PERSON.")
    held = Voiceprints.read(args.out, campplus.CampPlus.made_by) if files.exists(args.out) else None
    if args.erase:
        unknown = [person for person in args.erase if held is None or person not in held.persons]
        if held is None or unknown:
            raise ReadVoicesError(f"{args.out} has no {named(unknown[0])}; nothing was erased.")
        held = held.without(args.erase)
    if args.folder:
        found = enrol(args.folder, role=args.role, expires=args.expires, channel=args.channel)
        held = held.joined(found) if held and held.persons else found
    assert held is not None
    held.write(args.out)
    say(f"{args.out}: {len(held.persons):,} persons. It is a file of voiceprints: keep it as such.")


def enrol(
    folder: str,
    *,
    role: str = "agent",
    expires: datetime.date | None = None,
    channel: int | None = None,
    config: Config = Config(),  # noqa: B008 - frozen
) -> Voiceprints:
    """Voiceprints of the persons in a folder.

    Args:
        folder: A folder of recordings for each person, or a recording each.
        role: What they are in calls.
        expires: Last day on which they may be used; None is for ever.
        channel: Of recordings with several.
        config: Sections audio, vad, voices and extract.

    Raises:
        ReadRecordingsError: if there are no recordings.
        ReadVoicesError: if a person has too little speech or two sources, or a recording cannot be read.
        UsageError: if a recording has several channels and none is named.
    """
    campplus.CampPlus()
    by_person = _persons(folder, config)
    decoder = Decoder(config.extract.decode_timeout_s)
    try:
        made = {person: _voice(person, paths, decoder, channel, config) for person, paths in by_person.items()}
    finally:
        decoder.close()
    n = len(made)
    vectors = np.stack([vector for vector, _ in made.values()])
    seconds = [seconds for _, seconds in made.values()]
    return Voiceprints(
        list(made), [role.strip().lower()] * n, [expires] * n, seconds, vectors, campplus.CampPlus.made_by
    )


def _persons(folder: str, config: Config) -> dict[str, list[str]]:
    """The paths of each person's recordings; a line names the folders that hold none."""
    by_person: dict[str, list[str]] = {}
    source_of: dict[str, str] = {}
    for item in list_recordings(folder, config.audio).recordings:
        source, *below = item.name.split("/")
        person = (source if below else posixpath.splitext(source)[0]).strip()
        if (other := source_of.setdefault(person, source)) != source:
            raise ReadVoicesError(
                f"{folder} holds {named(other)} and {named(source)}, both of the person {named(person)}. Put the "
                "recordings of a person into one folder, or rename one of them."
            )
        by_person.setdefault(person, []).append(item.path)
    if not files.is_uri(folder) and os.path.isdir(folder):
        with os.scandir(folder) as entries:
            folders = {shown(entry.name) for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
        if without := sorted(folders - set(source_of.values())):
            say(f"warning: folders without recordings, from which no person is enrolled: {', '.join(without)}")
    return by_person


def _voice(
    person: str, paths: Sequence[str], decoder: Decoder, channel: int | None, config: Config
) -> tuple[np.ndarray, float]:
    """A person's vector, and of how many seconds of speech it is."""
    window = round(config.voices.window_s * SAMPLING_RATE_HZ)
    sums, seconds = [], 0.0
    for path in paths:
        try:
            recording = Recording(path, decoder, config.audio)
            n_channels = recording.info.channels
            if channel is None and n_channels > 1:
                raise UsageError(
                    f"{named(path)} has {n_channels} channels; say by --channel in which the person speaks."
                )
            own = channel or 0
            if own >= n_channels:
                raise UsageError(f"{named(path)} has {n_channels} channels, counted from 0; --channel is {own}.")
            finder, found = UtteranceFinder(n_channels, config.vad), []
            for block in recording.blocks():
                found += finder.push(block)
            found += finder.finish()
        except AudioProblem as problem:
            raise ReadVoicesError(f"{named(path)} cannot be used: {problem.reason}.") from None
        speech = [utterance.samples for utterance in found if utterance.channel == own]
        # The same windows as in calls, so that vectors are comparable.
        windows = [s[at : at + window] for s in speech for at in range(0, len(s) - window + 1, window // 2)]
        seconds += sum(map(len, speech)) / SAMPLING_RATE_HZ
        if windows:
            sums.append(campplus.embed(np.stack(windows)).sum(axis=0))
    if seconds < LEAST_S or not sums:
        raise ReadVoicesError(
            f"{named(person)} has {seconds:.1f} s of speech; {LEAST_S:.0f} s at least are needed, a minute is better."
        )
    each = unit(np.stack(sums))
    if (least := float((each @ each.T).min())) < _ALIKE:
        say(f"warning: the recordings of {person} are not very similar ({least:.2f}): is another person in them?")
    return unit(np.sum(sums, axis=0)), seconds


def _day(text: str) -> datetime.date:
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no date such as 2027-01-31") from None
    if day < datetime.date.today():
        raise argparse.ArgumentTypeError(f"'{text}' is past; give today or a later day, such as 2099-01-31")
    return day


def _channel(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a channel, counted from 0")
    return int(text)


if __name__ == "__main__":
    cli.run(main, "vaemo enrol")
