"""Mono calls of real voices whose turns are known: clips of two or more people, put together as people talk.

Gaps between turns reach from -0.5 to 2 s, some turns have a backchannel of the listener over them. A pause of 0.3 s
within a clip ends a turn. The sound is 8 kHz mu-law, or that through MP3 at 16 kb/s, or with babble at 15 dB.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from vaemo.voices.turns import Turn

RATE = 8000
CONDITIONS = ("clean", "mp3", "babble")
_SEXES = {"m": ("03", "10", "11", "12", "15"), "f": ("08", "09", "13", "14", "16")}
_PROMPTS = 150
"""Prompts that are read of a voice, many times what a call needs."""

_LEVEL = 0.06
"""Root mean square of a voice."""

_PAUSE_S = 0.3
"""A pause of this length ends a turn: the rule of NIST's Rich Transcription evaluations."""


@dataclass(frozen=True, eq=False)
class Voice:
    """A person: clips at 8 kHz, (n,), without silence around them."""

    name: str
    language: str
    sex: str
    clips: Sequence[np.ndarray]


@dataclass(frozen=True)
class Call:
    """A call: its samples at 8 kHz, and who says what."""

    name: str
    samples: np.ndarray
    turns: Sequence[Turn]


def emodb(folder: Path) -> dict[str, Voice]:
    """The ten actors of Emo-DB by their numbers."""
    voices = {}
    for sex, speakers in _SEXES.items():
        for speaker in speakers:
            clips = [_clip(path) for path in sorted(folder.glob(f"{speaker}*.flac"))]
            voices[speaker] = Voice(speaker, "de", sex, clips)
    return voices


def prompts(folder: Path, names: Sequence[str] = ()) -> dict[str, Voice]:
    """The voices of Debian's packages asterisk-core-sounds-* and asterisk-prompt-*, below `sounds`; or some of them."""
    named = {
        "en_US_f_Allison": ("en", "f"),
        "es_MX_f_Allison": ("es", "f"),
        "es": ("es", "f"),
        "fr_CA_f_June": ("fr", "f"),
        "fr": ("fr", "f"),
        "it_IT_f_Menardi": ("it", "f"),
        "it_IT_m_Carlo": ("it", "m"),
        "ru_RU_f_IvrvoiceRU": ("ru", "f"),
    }
    voices = {}
    for name, (language, sex) in named.items():
        if names and name not in names:
            continue
        files = (path for path in (folder / name).rglob("*.*") if path.suffix in {".wav", ".gsm", ".WAV"})
        paths = sorted(path for path in files if path.parent.name != "silence")
        clips = [
            clip for path in paths[:: max(len(paths) // _PROMPTS, 1)] if 1.0 <= len(clip := _clip(path)) / RATE <= 9.0
        ]
        if clips:
            voices[name] = Voice(name, language, sex, clips)
    return voices


def make_call(name: str, voices: Sequence[Voice], seed: int, *, seconds: float = 120.0, condition: str = "clean",
              babble: Sequence[Voice] = ()) -> Call:  # fmt: skip
    """A call of these people, who take turns in random order, nobody twice in a row where there are several."""
    draw = np.random.default_rng(seed)
    left = [list(draw.permutation(len(voice.clips))) for voice in voices]
    gains = 10 ** (draw.uniform(-3, 3, len(voices)) / 20)
    samples = np.zeros(round((seconds + 30) * RATE), np.float32)
    turns: list[Turn] = []
    at, speaker = 0.5, int(draw.integers(len(voices)))

    def say(who: int, clip: np.ndarray, start_s: float) -> float:
        first = round(start_s * RATE)
        samples[first : first + len(clip)] += gains[who] * clip
        loud = _loud(clip)
        for spoken in np.split(loud, np.flatnonzero(np.diff(loud) >= _PAUSE_S * RATE) + 1):
            turns.append(Turn(start_s + spoken[0] / RATE, start_s + (spoken[-1] + 1) / RATE, voices[who].name))
        return start_s + len(clip) / RATE

    def next_clip(who: int) -> np.ndarray:
        if not left[who]:
            left[who] = list(draw.permutation(len(voices[who].clips)))
        return voices[who].clips[left[who].pop()]

    while at < seconds:
        clips = [next_clip(speaker) for _ in range(int(draw.integers(1, 4)))]
        for number, clip in enumerate(clips):
            start = at if not number else at + draw.uniform(0.1, 0.6)
            at = say(speaker, clip, start)
            if len(voices) > 1 and draw.random() < 0.15 and len(clip) > 2 * RATE:
                other = (speaker + 1) % len(voices)
                length = round(draw.uniform(0.25, 0.6) * RATE)
                back = next_clip(other)[:length] * np.hanning(length + 2)[1:-1][: len(voices[other].clips[0])] ** 0.3
                say(other, back.astype(np.float32), start + draw.uniform(0.5, 1.2))
        at += float(np.clip(draw.normal(0.35, 0.55), -0.5, 2.0))
        if len(voices) > 1:
            speaker = int((speaker + draw.integers(1, len(voices))) % len(voices))
    samples = samples[: round((max(turn.end_s for turn in turns) + 0.5) * RATE)]
    if condition == "babble":
        noise = np.zeros_like(samples)
        for voice in babble:
            stream = np.concatenate([voice.clips[n] for n in draw.permutation(len(voice.clips))])
            noise += np.resize(np.roll(stream, int(draw.integers(len(stream)))), len(noise))
        loudness = np.sqrt(np.mean(samples[samples != 0] ** 2))
        samples = samples + noise * (loudness / np.sqrt(np.mean(noise**2)) * 10 ** (-15 / 20))
    return Call(name, np.clip(samples, -1, 1), sorted(turns, key=lambda turn: turn.start_s))


def write_call(call: Call, folder: Path, condition: str) -> Path:
    """The recording: mu-law WAV, or MP3 at 16 kb/s."""
    path = folder / f"{call.name}.wav"
    soundfile.write(path, call.samples, RATE, subtype="ULAW")
    if condition == "mp3":
        mp3 = path.with_suffix(".mp3")
        command = ["ffmpeg", "-v", "error", "-y", "-i", path, "-b:a", "16k", mp3]
        subprocess.run(command, check=True)
        path.unlink()
        return mp3
    return path


def pairs_of(voices: Mapping[str, Voice]) -> list[tuple[Voice, Voice]]:
    """All pairs of one language and one sex."""
    known = list(voices.values())
    return [(a, b) for n, a in enumerate(known) for b in known[n + 1 :] if (a.language, a.sex) == (b.language, b.sex)]


def _clip(path: Path) -> np.ndarray:
    """A clip at 8 kHz and one level, without the silence around it."""
    if path.suffix == ".gsm":
        samples, rate = soundfile.read(
            path, dtype="float32", format="RAW", subtype="GSM610", samplerate=8000, channels=1
        )
    else:
        samples, rate = soundfile.read(path, dtype="float32")
    if rate != RATE:
        samples = torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE).numpy()
    if not samples.any():
        return np.zeros(0, np.float32)
    loud = _loud(samples)
    clip = samples[loud[0] : loud[-1] + 1]
    return (clip * (_LEVEL / np.sqrt(np.mean(clip**2)))).astype(np.float32)


def _loud(samples: np.ndarray) -> np.ndarray:
    """Where a clip is within 30 dB of its loudest 20 ms."""
    power = np.convolve(samples**2, np.ones(160) / 160, mode="same")
    return np.flatnonzero(power > power.max() * 1e-3)
