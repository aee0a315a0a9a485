"""An archive as one finds them: calls in every format, between all that can be wrong with a file, a name or a folder.

`write_archive` makes it and says of every file what should become of it. The calls are of one and the same two-sided
conversation, whose turns are known to the sample.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from odd_files import ODD, write_av
from speech_cases import call

from vaemo.audio.sinc import resample

TURNS = 4
RATES = {"libopus": 48000, "aac": 16000, "libmp3lame": 16000, "libopencore_amrnb": 8000, "flac": 16000}
CALLS = {
    **{f"pcm-{number}.wav": ("PCM_16", 8000) for number in range(12)},
    **{f"mulaw-{number}.wav": ("ULAW", 8000) for number in range(12)},
    "alaw.WAV": ("ALAW", 8000),
    "gsm.wave": ("GSM610", 8000),
    "wide.wav": ("PCM_24", 44100),
    "float.w64": ("FLOAT", 16000),
    "a.flac": ("PCM_16", 16000),
    "a.aiff": ("PCM_16", 16000),
    "a.au": ("ULAW", 8000),
    "a.caf": ("PCM_16", 16000),
    "a.ogg": ("VORBIS", 16000),
}
ENCODED = {
    "a.mp3": ("libmp3lame", 2),
    "b.MP3": ("libmp3lame", 1),
    "a.m4a": ("aac", 2),
    "a.mp4": ("aac", 1),
    "a.aac": ("aac", 1),
    "a.webm": ("libopus", 2),
    "a.mka": ("flac", 2),
    "a.mkv": ("libopus", 1),
    "a.opus": ("libopus", 2),
    "a.amr": ("libopencore_amrnb", 1),
    "a.ts": ("aac", 2),
    "a.mov": ("aac", 2),
}


@dataclass
class Archive:
    """What lies in the folder.

    Attributes:
        folder: Where.
        turns: (channel, start_s, end_s) of every sentence of the calls.
        calls: Names of the good calls, and how many channels each has.
        others: Status of the row of every other file that is a recording by its name.
        passed_over: How many files are none.
        twins: Names of files that hold the bytes of another, and its name.
    """

    folder: Path
    turns: list[tuple[int, float, float]]
    calls: dict[str, int] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    passed_over: int = 0
    twins: dict[str, str] = field(default_factory=dict)


def write_archive(folder: Path) -> Archive:
    """Write all of it, at least 120 files."""
    samples, turns = call(TURNS, seed=3)
    archive = Archive(folder, turns)
    folder.mkdir(parents=True)
    _write_calls(archive, samples)
    _write_headerless(archive, samples)
    _write_odd(archive)
    _write_names_and_links(archive)
    for name in ("notes.txt", "index.json", "calls.csv", "thumbs.db", "README"):
        (folder / name).write_text("no recording")
        archive.passed_over += 1
    _note_twins(archive)
    return archive


def _note_twins(archive: Archive) -> None:
    """Of files with the same bytes all but the first by name are duplicates, whatever else they are."""
    first: dict[bytes, str] = {}
    for name in sorted(archive.calls.keys() | archive.others.keys()):
        path = archive.folder / name
        if not path.is_file() or not (content := path.read_bytes()):
            continue
        if content in first and archive.others.get(name) not in (None, "undecodable"):
            archive.others[name] = "duplicate"
            archive.twins[name] = first[content]
        first.setdefault(content, name)


def at_rate(samples: np.ndarray, rate: int) -> np.ndarray:
    """(C, n) at 16 kHz as (m, C) at another rate."""
    return resample(torch.from_numpy(samples), 16000, rate).numpy().T.copy()


def _write_calls(archive: Archive, samples: np.ndarray) -> None:
    for number, (name, (subtype, rate)) in enumerate(CALLS.items()):
        path = archive.folder / f"2026-{number % 4:02d}" / name
        path.parent.mkdir(exist_ok=True)
        # No two of them hold the same bytes.
        heard = at_rate(samples * (1.0 - 0.002 * number), rate)
        kind = {"wave": "WAV", "WAV": "WAV"}.get(name.rpartition(".")[2])
        heard = heard.mean(axis=1, keepdims=True) if subtype == "GSM610" else heard
        soundfile.write(path, heard, rate, subtype=subtype, format=kind)
        archive.calls[f"{path.parent.name}/{name}"] = 1 if subtype == "GSM610" else 2
    for name, (codec, channels) in ENCODED.items():
        heard = at_rate(samples if channels == 2 else samples.mean(0, keepdims=True), RATES[codec])
        options = {"aac": {"format": "adts"}, "MP3": {"format": "mp3"}}.get(name.rpartition(".")[2], {})
        write_av(archive.folder / name, heard, RATES[codec], codec, **options)
        archive.calls[name] = channels


def _write_headerless(archive: Archive, samples: np.ndarray) -> None:
    mono = at_rate(samples.mean(0, keepdims=True), 8000)
    mono = mono[: len(mono) // 1024 * 1024]
    for name, subtype in (("h.ulaw", "ULAW"), ("h.al", "ALAW"), ("h.sln", "PCM_16"), ("h.vox", "VOX_ADPCM")):
        soundfile.write(archive.folder / name, mono, 8000, subtype=subtype, format="RAW")
        archive.calls[name] = 1
    soundfile.write(archive.folder / "h.raw", mono, 8000, subtype="PCM_16", format="RAW")
    archive.passed_over += 1


def _write_odd(archive: Archive) -> None:
    """What an utterance of a manifest may meet, as recordings: noise holds no speech."""
    folder = archive.folder / "odd"
    folder.mkdir()
    for name, (write, status) in ODD.items():
        if write is None:
            continue
        write(folder / name)
        if (folder / name).is_dir():
            continue
        archive.others[f"odd/{name}"] = {"ok": "silent", "too_short": "silent"}.get(status, status)


def _write_names_and_links(archive: Archive) -> None:
    folder, first = archive.folder, next(iter(archive.calls))
    content = (folder / "2026-01" / "pcm-1.wav").read_bytes()
    for name in (b"Gespr\xe4ch.wav", b"a\tb.wav", b"_hidden not.wav"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            # A little longer each, so that none is the other's twin.
            file.write(content + bytes(2 * len(archive.calls)))
        archive.calls[name.decode(errors="backslashreplace").replace("\t", r"\x09")] = 2
    shutil.copy(folder / first, folder / "twin of the first.wav")
    (folder / "link to the first.wav").symlink_to(folder / first)
    archive.others |= {"twin of the first.wav": "duplicate", "link to the first.wav": "duplicate"}
    (folder / "around").symlink_to(folder)
    (folder / "2026-01" / "up").symlink_to(folder)
    (folder / "nowhere.wav").symlink_to(folder / "is not there.wav")
    archive.others["nowhere.wav"] = "missing"
    os.mkfifo(folder / "pipe.wav")
    archive.others["pipe.wav"] = "unreadable"
    for name in ("call.nmf", "call.wav.gpg", "call.wav.zip"):
        (folder / name).write_bytes(b"no decoder reads this")
        archive.others[name] = "undecodable"
    (folder / "table.parquet#3.wav").write_bytes(content + bytes(2000))
    archive.calls["table.parquet#3.wav"] = 2
