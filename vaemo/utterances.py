"""From audio to rows of the feature store: the functions that a worker applies to its shard.

Reads rows of a manifest, or recordings in which utterances are still to be found; returns a table with the columns of
the store's contract. Every utterance is a row. A row without features has a status and a reason. Nothing here knows of
Ray, shards or folders.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.audio.acoustics import Sound, require_usable, simulate_telephone, sound_of
from vaemo.audio.alike import AlikeChannels
from vaemo.audio.archive import shown
from vaemo.audio.formats import AUDIO_SUFFIXES as AUDIO_SUFFIXES
from vaemo.audio.recording import AudioProblem, Decoder, Recording
from vaemo.audio.vad import Utterance, UtteranceFinder
from vaemo.config import Config, VoicesConfig
from vaemo.data.manifest import with_labels
from vaemo.data.sessions import label_ranges
from vaemo.errors import ExtractorError
from vaemo.features import Extractor, ExtractorHung, ExtractorLost, StandIn
from vaemo.features.watch import watched
from vaemo.store import part_schema
from vaemo.tables import with_column
from vaemo.targets import Target, label_names
from vaemo.units import DIMENSIONS, MIXED, SAMPLING_RATE_HZ, UNKNOWN
from vaemo.voices import roles as evidence
from vaemo.voices.channels import Voice, VoiceCutter
from vaemo.voices.roles import Evidence, VoiceKey, VoiceRole, of_piece, why_unknown
from vaemo.voices.turns import Turn


@dataclass(frozen=True)
class Problem:
    """Why a session is listed and not read.

    Attributes:
        status: Of its rows.
        reason: Of its rows: what was found.
        duplicate_of: The session whose bytes it has, for `duplicate`.
    """

    status: str
    reason: str
    duplicate_of: str | None = None


@dataclass(frozen=True)
class _Found:
    """Speech that was found, or a recording as a whole where it has no channel; columns of a part by name."""

    channel: int | None
    start_s: float | None
    end_s: float | None
    role: str | None = None
    voice: int | None = None
    voice_margin: float | None = None
    role_by: str | None = None
    role_margin: float | None = None


_BUFFER_S = 600.0
"""Seconds of speech that wait for the extractors: enough to batch utterances of like length."""

_KEPT_S = 0.005
"""An utterance of which less is there is lost."""

_ALIKE = "its channel holds the same as another one, so that it does not tell who speaks; give the call as one channel"

_HOPELESS = 5
"""An extractor whose process dies on each of this many utterances, the first of a buffer, is itself broken."""


def unsaid_roles(n_channels: int) -> Sequence[str | None]:
    """The roles of a recording's channels where none are given: a single channel holds all speakers and is `mixed`."""
    return [MIXED] if n_channels == 1 else [None] * n_channels


def extract_utterances(
    rows: pa.Table, *, extractors: Mapping[str, Extractor], config: Config, decoder: Decoder | None = None
) -> pa.Table:
    """Features of the utterances of a manifest.

    A recording that many rows cut from is opened once. Labels and observed values go from the corpus's own range
    (`labels.range`) to the model's.

    Args:
        rows: As `read_manifest` returns them.
        extractors: By stream.
        config: Sections audio, features, labels, model.label_range and extract.
        decoder: The process that decodes; None starts one for this call.

    Returns:
        The same rows in the same order: the columns of `part_schema`, then the manifest's others (`audio_path`
        and unknown ones). A row without features has null vectors, a status and a reason.
    """
    work = _Work(extractors, config, rows.num_rows)
    paths = rows["audio_path"].to_pylist()
    start_s, end_s, channels = (rows[name].to_pylist() for name in ("start_s", "end_s", "channel"))
    with _decoding(decoder, config) as open_decoder:
        path, recording, lost, heard = None, None, None, list[int]()
        for row in sorted(range(rows.num_rows), key=lambda row: (paths[row], start_s[row] or 0.0)):
            try:
                if paths[row] != path:
                    path, recording, lost, heard = paths[row], None, None, []
                    recording = Recording(path, open_decoder, config.audio)
                if lost or recording is None:
                    raise lost or AudioProblem("undecodable", "it cannot be opened")
                heard.append(row)
                place = start_s[row], end_s[row], channels[row]
                samples = recording.utterance(*place)
                work.add(row, samples, recording.lost_s(*place), _cut_s(samples, *place[:2]))
            except AudioProblem as problem:
                for failed in heard if problem.whole else [row]:
                    work.fail(failed, problem)
                if recording is None or problem.whole or not open_decoder.alive:
                    # What cannot be opened, or ends its decoder, is not tried again for every utterance in it.
                    lost = problem
    result = work.finish()
    return _joined(_on_model_scale(rows, config), result, extractors, config.model.targets)


@dataclass(frozen=True)
class Parties:
    """Who speaks in a recording, as far as that is known beforehand, and whose speech gets features.

    Attributes:
        roles_of: Gives the role of each channel, None where it is not known, for how many there are.
        scored: Whether a role gets features; utterances of others are listed with status `not_scored_role`.
        turns: Who speaks when, where a file says so.
        roles_of_voices: Gives the roles of voices for those of channels; None uses what `turns` say alone.
        verifies: Whether it compares vectors of voices that `turns` name.
        expected: See `VoiceCutter`.
    """

    roles_of: Callable[[int], Sequence[str | None]] = unsaid_roles
    scored: Callable[[str | None], bool] = lambda role: True
    turns: Sequence[Turn] | None = None
    roles_of_voices: Callable[[Sequence[Voice], Sequence[str]], Mapping[VoiceKey, VoiceRole]] | None = None
    verifies: bool = False
    expected: np.ndarray | None = None


@dataclass
class Course:
    """A session of several recordings, as far as it was read.

    Attributes:
        counts: Utterances so far, by channel.
        heard_s: Length of the recording that was read last.
    """

    counts: Counter[int] = field(default_factory=Counter)
    heard_s: float = 0.0


def extract_recording(
    path: str,
    session_id: str,
    *,
    extractors: Mapping[str, Extractor],
    config: Config,
    decoder: Decoder | None = None,
    parties: Parties = Parties(),
    problem: Problem | None = None,
    course: Course | None = None,
) -> pa.Table:
    """Find the utterances of a recording, channel by channel, and compute their features.

    `utt_id` is `{session_id}#c{channel}-{index:05d}`, `speaker_id` the session with the channel, and with the voice
    (`#c0v1`) where voices are separated: the recording is then read twice, since voices are known at its end. What
    cannot be read is one row with null times, its status and its reason; one that breaks off, or is damaged in places,
    has that row beside its utterances; one without speech has that row with status `silent`. Where the samples are on
    another scale all rows have that status.

    Args:
        path: Local path, URI, or a reference to what a manifest embeds (`vaemo.data.manifest.EMBEDDED`).
        session_id: Id of the recording.
        extractors: By stream.
        config: Sections audio, vad, voices, features and extract.
        decoder: The process that decodes; None starts one for this call.
        parties: Who speaks, and whose speech gets features.
        problem: Why the recording is listed and not read, where that is known beforehand.
        course: Of a session of several recordings, of which this is the next; see `extract_session`.

    Returns:
        The columns of `part_schema`, rows by start, then channel.
    """
    search, course = _Search(_Work(extractors, config), config, parties), course or Course()
    with _decoding(decoder, config) as open_decoder:
        try:
            if problem:
                raise AudioProblem(problem.status, problem.reason)
            search.read(Recording(path, open_decoder, config.audio), course)
        except AudioProblem as what:
            search.end_with(what)
    rows = _found_rows(path, session_id, search.found, search.n_channels, course.counts)
    if problem and problem.duplicate_of:
        rows = rows.append_column("duplicate_of", pa.repeat(problem.duplicate_of, rows.num_rows))
    return _joined(rows, search.work.finish(), extractors, config.model.targets, by_start=True)


class _Search:
    """The utterances of a recording, each measured as soon as it is found.

    Attributes:
        work: What measures them.
        found: The utterances, and at the end a row of the recording itself where there is something to say of it.
        n_channels: Of the recording; 0 where it was not opened.
    """

    def __init__(self, work: _Work, config: Config, parties: Parties) -> None:
        self.work = work
        self.found: list[_Found] = []
        self.n_channels = 0
        self._config, self._parties = config, parties

    def read(self, recording: Recording, course: Course) -> None:
        """Find and measure everything.

        Raises:
            AudioProblem: for what keeps the recording, or a part of it, from being heard.
        """
        config, parties = self._config, self._parties
        roles = parties.roles_of(recording.info.channels)
        self.n_channels = len(roles)
        finder, bad, alike = UtteranceFinder(len(roles), config.vad), _NotFinite(), AlikeChannels()
        spoken: list[tuple[int, float, float]] = []
        cutter = VoiceCutter(
            len(roles),
            config.voices,
            config.vad,
            parties.turns,
            vectors=parties.verifies,
            expected=parties.expected,
        )
        broken = None
        try:
            for utterance in _utterances(recording, finder, bad, alike):
                place = utterance.channel, utterance.start_s, utterance.end_s
                spoken.append(place)
                if utterance.channel in cutter.channels:
                    cutter.push(utterance)
                else:
                    one = _Found(*place, role=roles[utterance.channel])
                    self._take(recording, one, functools.partial(_same, utterance.samples))
        except AudioProblem as what:
            if what.whole:
                raise
            broken = what
        finally:
            course.heard_s = finder.heard_s
        if broken is None and (misfit := cutter.misfit(len(roles), finder.heard_s)):
            raise AudioProblem("bad_voices", misfit)
        for group in alike.groups(spoken):
            roles = self._without_alike(roles, group)
        self._take_pieces(recording, cutter, roles)
        damage = broken or recording.damage() or bad.problem
        if broken is None and not self.found and (damage is None or damage.status == "damaged"):
            raise AudioProblem("silent", f"no speech was found in it{f'; {damage.reason}' if damage else ''}")
        if damage is not None:
            raise damage

    def _without_alike(self, roles: Sequence[str | None], group: Sequence[int]) -> Sequence[str | None]:
        """The roles, those of channels that hold the same audio as `mixed`: each has the speech of all.

        Where they have one role, it is that of the person who speaks there: the first of them is enough.
        """
        said = {roles[channel] or UNKNOWN for channel in group}
        is_one = len(said) == 1 and not said & {UNKNOWN, MIXED}
        reason = f"its channel holds the same as channel {group[0]}, which has the same role" if is_one else _ALIKE
        for row, one in enumerate(self.found):
            if one.channel in (group[1:] if is_one else group):
                if not is_one:
                    self.found[row] = dataclasses.replace(one, role=MIXED)
                if is_one or not self._parties.scored(MIXED):
                    self.work.fail(row, AudioProblem("not_scored_role", reason))
        return roles if is_one else [MIXED if channel in group else role for channel, role in enumerate(roles)]

    def end_with(self, problem: AudioProblem) -> None:
        """Add the recording's own row; where the problem is of the whole recording, all rows have it."""
        if problem.whole:
            for row in range(len(self.found)):
                self.work.fail(row, problem)
        self.found.append(_Found(None, None, None))
        self.work.fail(len(self.found) - 1, problem)

    def _take(
        self, recording: Recording, one: _Found, samples: Callable[[], np.ndarray], why_not: str | None = None
    ) -> None:
        self.found.append(one)
        row = len(self.found) - 1
        if self._parties.scored(one.role):
            self.work.try_add(row, samples, lambda: recording.lost_s(one.start_s, one.end_s, one.channel))
        else:
            reason = why_not or f"role {one.role or 'unknown'} is not scored"
            self.work.fail(row, AudioProblem("not_scored_role", reason))

    def _take_pieces(self, recording: Recording, cutter: VoiceCutter, roles: Sequence[str | None]) -> None:
        """The utterances of channels in which voices are told apart."""
        how = self._config.voices
        pieces, voices = cutter.finish()
        decide = self._parties.roles_of_voices or functools.partial(_without_evidence, how)
        by_voice = decide(voices, [role or UNKNOWN for role in roles]) if voices else {}
        for piece in pieces:
            of_voice = by_voice.get((piece.channel, piece.voice), VoiceRole(UNKNOWN))
            role = of_piece(of_voice, piece.margin, how)
            place = piece.channel, piece.start_s, piece.end_s
            one = _Found(*place, role.role, piece.voice, piece.margin, role.by, role.margin)
            why_not = why_unknown(of_voice, piece.margin, how) if role.role == UNKNOWN else None
            self._take(recording, one, functools.partial(recording.utterance, *place[1:], piece.channel), why_not)


def extract_session(
    recordings: Sequence[tuple[float | None, Callable[[Course], pa.Table]]],
) -> pa.Table:
    """The utterances of a session of several recordings, all on one course.

    `start_s` and `end_s` stay places in the recording that `audio_path` names, which begins `offset_s` after the
    session. Utterances are numbered through, channel by channel, and come by their time in the session. What a channel
    holds in all recordings is one speaker, but for recordings that run while others do, and voices that were told
    apart: these have the number of the recording in their `speaker_id` (`#c0f2`).

    Args:
        recordings: Each with where it begins, None for behind the one before it, and what extracts it
            (`extract_recording` on this course).

    Returns:
        As `extract_recording`.
    """
    course, tables, times, ended_s, latest_s = Course(), [], [], 0.0, 0.0
    for number, (given_s, extract) in enumerate(recordings, 1):
        offset_s, course.heard_s = ended_s if given_s is None else given_s, 0.0
        table = extract(course)
        end_s = offset_s + course.heard_s
        if number > 1:
            aside = pa.scalar(offset_s < latest_s - _KEPT_S)
            apart = pc.and_(pc.or_(table["voice"].is_valid(), aside), table["channel"].is_valid())
            own = pc.binary_join_element_wise(table["speaker_id"], f"f{number}", "")
            table = with_column(table, "speaker_id", pc.if_else(apart, own, table["speaker_id"]))
        start_s = pc.add(table["start_s"], offset_s).fill_null(end_s)
        tables.append(with_column(table, "offset_s", pa.repeat(offset_s, table.num_rows)))
        times.append(start_s.to_numpy())
        ended_s, latest_s = end_s, max(latest_s, end_s)
    order = np.argsort(np.concatenate(times), kind="stable")
    rows = pa.concat_tables(tables).take(pa.array(order))
    return with_column(rows, "position", pa.array(np.arange(rows.num_rows, dtype=np.int32)))


def as_heard(samples: np.ndarray, config: Config) -> np.ndarray:
    """What extractors are given of an utterance, in extraction, live and in end-to-end training.

    Args:
        samples: (n,), float32, 16 kHz.
        config: Sections audio (whether a telephone is simulated) and features (the shortest utterance).

    Raises:
        AudioProblem: if it is too short, silent, or holds NaN.
    """
    require_usable(samples, config.features.min_utterance_s)
    return simulate_telephone(samples) if config.audio.simulate_telephone else samples


def measured(vector: np.ndarray, extractor: Extractor, seconds: float) -> np.ndarray:
    """The vector of an utterance; AudioProblem where its extractor has found nothing."""
    if not np.isfinite(vector).all():
        raise AudioProblem("too_short", f"{extractor.name} finds nothing to measure in {seconds:.3f} s")
    return vector


def listed_only(rows: pa.Table, *, extractors: Mapping[str, Extractor], config: Config) -> pa.Table:
    """What `extract_utterances` gives for rows of a manifest that are not read: no features, no status yet."""
    work = _Work(extractors, config, rows.num_rows)
    for row in range(rows.num_rows):
        work.fail(row, AudioProblem("missing", "it was not read"))
    return _joined(_on_model_scale(rows, config), work.finish(), extractors, config.model.targets)


def _same(samples: np.ndarray) -> np.ndarray:
    return samples


def _without_evidence(
    config: VoicesConfig, voices: Sequence[Voice], channel_roles: Sequence[str]
) -> dict[evidence.VoiceKey, VoiceRole]:
    """The roles of voices where nothing is known of them but their channels' roles."""
    return evidence.roles_of_voices(voices, channel_roles, Evidence(), None, config)


class _NotFinite:
    """How much of a recording is NaN or infinite. Only utterances that hold such samples are lost by it."""

    def __init__(self) -> None:
        self._read = self._bad = self._first = 0

    def look(self, block: np.ndarray) -> None:
        """Count the next samples, (C, n), 16 kHz."""
        bad = ~np.isfinite(block).all(axis=0)
        if bad.any():
            self._first = self._first if self._bad else self._read + int(bad.argmax())
            self._bad += int(bad.sum())
        self._read += block.shape[1]

    @property
    def problem(self) -> AudioProblem | None:
        """What the recording's own row says of it."""
        if not self._bad:
            return None
        length, at = self._bad / SAMPLING_RATE_HZ, self._first / SAMPLING_RATE_HZ
        return AudioProblem("nan_audio", f"{length:.3f} s of it are NaN or infinite, from {at:.1f} s on")


def _utterances(
    recording: Recording, finder: UtteranceFinder, bad: _NotFinite, alike: AlikeChannels
) -> Iterator[Utterance]:
    for block in recording.blocks():
        bad.look(block)
        alike.look(block)
        yield from finder.push(block)
    yield from finder.finish()


def _found_rows(path: str, session_id: str, found: Sequence[_Found], n_channels: int, counts: Counter[int]) -> pa.Table:
    utt_ids, speaker_ids = [], []
    for one in found:
        index = counts[one.channel or 0]
        counts[one.channel or 0] += 1
        utt_ids.append(f"{session_id}#c{one.channel or 0}-{index:05d}")
        speaker = "" if one.channel is None else f"#c{one.channel}" + ("" if one.voice is None else f"v{one.voice}")
        speaker_ids.append(f"{session_id}{speaker}")
    said = {
        name: pa.array([getattr(one, name) for one in found], type_)
        for name, type_ in (
            ("channel", pa.int32()),
            ("role", pa.string()),
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("voice", pa.int32()),
            ("voice_margin", pa.float32()),
            ("role_by", pa.string()),
            ("role_margin", pa.float32()),
        )
    }
    return pa.table(
        {
            "session_id": pa.array([session_id] * len(found), pa.string()),
            "utt_id": pa.array(utt_ids, pa.string()),
            "speaker_id": pa.array(speaker_ids, pa.string()),
            "n_channels": pa.array([n_channels or None] * len(found), pa.int32()),
            **said,
            "audio_path": pa.array([shown(path)] * len(found), pa.string()),
        }
    )


class _Work:
    """Utterances on their way through the extractors, by row number.

    Samples of `_BUFFER_S` are held at most, and as many again where another process computes: what was begun there is
    waited for when the next buffer is full.
    """

    def __init__(self, extractors: Mapping[str, Extractor], config: Config, n_rows: int = 0) -> None:
        self._extractors = extractors
        self._config = config
        self._problems: dict[int, AudioProblem] = {}
        self._duration_s: dict[int, float] = {}
        self._lost_s: dict[int, float] = {}
        self._sounds: dict[int, Sound] = {}
        self._vectors: dict[str, dict[int, np.ndarray]] = {stream: {} for stream in extractors}
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._waiting_s = 0.0
        self._begun: list[tuple[str, list[int], list[np.ndarray], Callable[[], np.ndarray]]] = []
        self._n_rows = n_rows

    def add(self, row: int, samples: np.ndarray, lost_s: float, cut_s: float = 0.0) -> None:
        """Take an utterance, with its inserted silence and the part cut off at the end of the file.

        Raises:
            AudioProblem: if it cannot be used.
        """
        self._n_rows = max(self._n_rows, row + 1)
        self._duration_s[row] = len(samples) / SAMPLING_RATE_HZ
        self._lost_s[row] = lost_s + cut_s
        if lost_s and lost_s >= self._duration_s[row] - _KEPT_S:
            raise AudioProblem("undecodable", "the file holds nothing of it that can be decoded")
        heard = as_heard(samples, self._config)
        self._sounds[row] = sound_of(heard)
        self._waiting.append((row, heard))
        self._waiting_s += self._duration_s[row]
        if self._waiting_s >= _BUFFER_S:
            self._run()

    def try_add(self, row: int, samples: Callable[[], np.ndarray], lost_s: Callable[[], float]) -> None:
        """Take an utterance once it is read, or note why not."""
        try:
            self.add(row, samples(), lost_s())
        except AudioProblem as problem:
            self.fail(row, problem)

    def fail(self, row: int, problem: AudioProblem) -> None:
        """Note that a row has no features."""
        self._n_rows = max(self._n_rows, row + 1)
        self._problems[row] = problem

    def finish(self) -> dict[str, pa.Array]:
        """Columns `duration_s`, those of `Sound`, `status`, `reason`, `lost_s` and the streams, by row number."""
        self._run()
        self._collect()
        rows = range(self._n_rows)
        problems = [self._problems.get(row) for row in rows]
        columns: dict[str, pa.Array] = {
            "duration_s": pa.array([self._duration_s.get(row) for row in rows], pa.float64()),
            **{
                name: pa.array([getattr(self._sounds.get(row), name, None) for row in rows], pa.float32())
                for name in Sound._fields
            },
            "status": pa.array([problem.status if problem else "ok" for problem in problems], pa.string()),
            "reason": pa.array([problem.reason if problem else None for problem in problems], pa.string()),
            "lost_s": pa.array([self._lost_s.get(row) for row in rows], pa.float64()),
        }
        for stream, extractor in self._extractors.items():
            matrix = np.zeros((self._n_rows, extractor.dim), np.float32)
            for row, vector in self._vectors[stream].items():
                matrix[row] = vector
            absent = pa.array([problem is not None for problem in problems], pa.bool_())
            columns[stream] = pa.FixedSizeListArray.from_arrays(
                pa.array(matrix.reshape(-1)), type=pa.list_(pa.float32(), extractor.dim), mask=absent
            )
        return columns

    def _run(self) -> None:
        self._collect()
        rows = [row for row, _ in self._waiting]
        utterances = [samples for _, samples in self._waiting]
        self._waiting, self._waiting_s = [], 0.0
        if not rows:
            return
        for stream, extractor in self._extractors.items():
            if isinstance(extractor, StandIn):
                self._begun.append((stream, rows, utterances, extractor.begin(utterances)))
        for stream, extractor in self._extractors.items():
            if not isinstance(extractor, StandIn):
                with watched(self._config.extract.features_timeout_s):
                    self._keep(stream, rows, extractor(utterances))

    def _collect(self) -> None:
        """Take the vectors of what was begun elsewhere."""
        begun, self._begun = self._begun, []
        for stream, rows, utterances, wait in begun:
            try:
                self._keep(stream, rows, wait())
            except ExtractorLost:
                self._one_by_one(stream, rows, utterances)

    def _one_by_one(self, stream: str, rows: Sequence[int], utterances: Sequence[np.ndarray]) -> None:
        """Take the vectors of a buffer that has ended the process which computes; an utterance that does so fails."""
        extractor, n_lost = self._extractors[stream], 0
        for number, (row, samples) in enumerate(zip(rows, utterances, strict=True), 1):
            try:
                self._keep(stream, [row], extractor([samples]))
            except ExtractorLost as lost:
                if isinstance(lost, ExtractorHung):
                    self.fail(row, AudioProblem("timeout", f"{extractor.name} took longer than {lost} for it"))
                else:
                    self.fail(row, AudioProblem("undecodable", f"{extractor.name} ended its process on it ({lost})"))
                n_lost += 1
                if n_lost == number == _HOPELESS:
                    raise ExtractorError(
                        f"{extractor.name} ended its process on each of {number} utterances alone ({lost}): it is "
                        "broken here, or memory is short. What is finished is kept; correct it and run the same "
                        "command again."
                    ) from None

    def _keep(self, stream: str, rows: Sequence[int], vectors: np.ndarray) -> None:
        for row, vector in zip(rows, vectors, strict=True):
            try:
                self._vectors[stream][row] = measured(vector, self._extractors[stream], self._duration_s[row])
            except AudioProblem as problem:
                self._problems.setdefault(row, problem)


def _cut_s(samples: np.ndarray, start_s: float | None, end_s: float | None) -> float:
    """How much of an utterance lies after the end of its recording."""
    cut_s = 0.0 if end_s is None else end_s - (start_s or 0.0) - len(samples) / SAMPLING_RATE_HZ
    return cut_s if cut_s > _KEPT_S else 0.0


class _decoding:  # noqa: N801 - reads as a verb where it is used
    """The decoder that is given, or one that ends with the block."""

    def __init__(self, decoder: Decoder | None, config: Config) -> None:
        self._given, self._timeout_s = decoder, config.extract.decode_timeout_s

    def __enter__(self) -> Decoder:
        self._own = self._given or Decoder(self._timeout_s)
        return self._own

    def __exit__(self, *_: object) -> None:
        if self._given is None:
            self._own.close()


def _on_model_scale(rows: pa.Table, config: Config) -> pa.Table:
    ranges, targets = label_ranges(config), config.model.targets
    rows = ranges.mapped_spread(with_labels(rows, targets))
    for name in label_names(targets):
        column, held = rows[name].cast(pa.float64()), ranges[name.removeprefix("observed_")]
        values = held.scale.to(held.model, column.to_numpy())
        scaled = pa.array(values, pa.float32(), mask=column.is_null().to_numpy())
        rows = with_column(rows, name, scaled)
    return rows


def _joined(
    rows: pa.Table,
    result: Mapping[str, pa.Array],
    extractors: Mapping[str, Extractor],
    targets: Sequence[str | Target] = DIMENSIONS,
    *,
    by_start: bool = False,
) -> pa.Table:
    """What is known of the rows and what was computed, as the store's contract has it."""
    known = {name: rows[name] for name in rows.column_names}
    if by_start:
        start_s = rows["start_s"].fill_null(np.inf).to_numpy()
        order = np.lexsort((rows["channel"].fill_null(-1).to_numpy(), start_s))
        known = {name: column.take(pa.array(order)) for name, column in known.items()}
        result = {name: column.take(pa.array(order)) for name, column in result.items()}
        known["position"] = pa.array(np.arange(rows.num_rows, dtype=np.int32))
    columns = {**known, **result}
    schema = part_schema({stream: extractor.dim for stream, extractor in extractors.items()}, targets)
    contract = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    others = [name for name in columns if name not in schema.names]
    return pa.table(
        [*contract, *(columns[name] for name in others)],
        names=[*schema.names, *others],
    )
