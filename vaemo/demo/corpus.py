"""A corpus of synthetic calls in which the memory of a conversation helps, by construction.

Every session has a valence and an arousal that drift slowly. They are the labels. What an utterance expresses is its
session's valence and arousal plus noise of its own, larger than the spread of the labels; and what is expressed sets
pitch, its range, rate, loudness and spectral tilt of the voice. One utterance alone therefore carries little
information, and a sequence much. Speakers differ in voice, pitch, rate and loudness, and are in one split only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from vaemo import files
from vaemo.demo.speech import resample, speak, tilt, trim
from vaemo.progress import Progress
from vaemo.units import SAMPLING_RATE_HZ

TELEPHONE_HZ = 8_000
UTTERANCES = (20, 40)
"""Fewest and most utterances of a session."""

DRIFT = 0.96
"""Share of its distance from the session's middle that the latent keeps from one utterance to the next."""

NOISE = 0.25
"""Deviation of what an utterance expresses around the label; the labels themselves deviate by about 0.2."""


@dataclass(frozen=True)
class Voice:
    """A speaker: an espeak-ng voice, and how it differs from the others when neutral.

    Attributes:
        speaker_id: Who it is.
        name: The espeak-ng voice.
        pitch: 0 to 100.
        rate: Words a minute.
        loudness_db: Against the average speaker.
        split: The speaker's only split; none for speakers of recordings.
    """

    speaker_id: str
    name: str
    pitch: int
    rate: int
    loudness_db: float
    split: str | None = None


# Some voices (f2, f3, f5) differ between runs: espeak-ng reads uninitialised memory. These do not.
CORPUS_VOICES = (
    Voice("ada", "en-us+f1", 48, 178, 0.5, "train"),
    Voice("ben", "en-us+m1", 50, 170, -0.5, "train"),
    Voice("cleo", "en-us+steph", 49, 179, 0.0, "train"),
    Voice("dan", "en-us+m3", 45, 166, 1.0, "train"),
    Voice("eve", "en-us+linda", 50, 174, -1.0, "train"),
    Voice("finn", "en+m7", 47, 182, 0.5, "train"),
    Voice("gus", "en-us+m6", 52, 169, 0.0, "train"),
    Voice("hana", "en-us+f4", 48, 177, -0.5, "dev"),
    Voice("ivan", "en+m2", 51, 172, 0.5, "dev"),
    Voice("jane", "en+belinda", 52, 186, -0.5, "test"),
    Voice("karl", "en-us+m4", 47, 175, 0.0, "test"),
    Voice("liam", "en+m5", 51, 171, 0.5, "test"),
)
CALLERS = (
    Voice("caller-1", "en-us+Annie", 50, 175, 0.0),
    Voice("caller-2", "en-us+m8", 48, 170, 0.0),
    Voice("caller-3", "en-us+steph2", 50, 181, 0.5),
)
AGENT = Voice("agent-1", "en-us+max", 48, 174, 0.0)

SENTENCES = (
    "I am calling about my order.",
    "It was sent on Monday morning.",
    "The number is on the letter.",
    "Let me look for the page.",
    "I have the box in front of me.",
    "It came with two cables.",
    "My name is on the contract.",
    "We moved to the new house.",
    "The light is green now.",
    "I wrote to you last week.",
    "There are three of them.",
    "It is the second one from the left.",
    "The bill is dated the fourth of May.",
    "I can wait for a moment.",
    "Please say that once more.",
    "The address has changed.",
    "I turned it off and on again.",
    "It is on the first floor.",
    "The street is behind the station.",
    "I have read the manual.",
    "We talked about it yesterday.",
    "The parcel weighs four pounds.",
    "I will write that down.",
    "My neighbour took it in.",
    "It is the blue one, not the red one.",
    "The card expires in June.",
    "I have used it since the spring.",
    "The screen shows a number.",
    "They open at half past nine.",
    "I am at home in the evening.",
)
AGENT_SENTENCES = (
    "How can I help you?",
    "Thank you, I will look it up.",
    "Could you give me the number?",
    "One moment, please.",
    "I see it here in the system.",
    "Is there anything else?",
    "I will make a note of that.",
    "Let me check with a colleague.",
)


def make_corpus(folder: str | Path, *, n_sessions: int = 84, seed: int = 0) -> Path:
    """Speak the labelled corpus: one 16 kHz WAV per session and `manifest.jsonl`, written last.

    The speakers take turns, so every split has its share of the sessions. The same arguments give the same bytes:
    espeak-ng carries the phase of its voice from one utterance to the next, so a process of its own speaks it all.

    Args:
        folder: Where to write.
        n_sessions: How many sessions.
        seed: Of latents, noise and texts.

    Returns:
        The manifest's path.
    """
    return _in_own_process(_make_corpus, Path(folder), n_sessions, seed)


def make_recordings(folder: str | Path, *, n_recordings: int = 6, seed: int = 0) -> Path:
    """Speak two-channel telephone calls (8 kHz mu-law WAV) of speakers that the corpus does not have.

    The customer is on channel 0, the agent on channel 1. `recordings/` holds the calls alone; beside it stand
    `calls.jsonl`, which names the channels' roles, and `truth.jsonl`: who really speaks when, and how they feel.

    Args:
        folder: Where to write.
        n_recordings: How many calls.
        seed: Of latents, noise, texts and pauses.

    Returns:
        The folder of recordings.
    """
    return _in_own_process(_make_recordings, Path(folder), n_recordings, seed)


def draw_latent(rng: np.random.Generator, n: int) -> np.ndarray:
    """Valence and arousal of a session's utterances, (n, 2), within (0, 1): a slow random walk around a middle."""
    middle = rng.normal(0.0, 0.8, 2)
    x = np.empty((n, 2))
    x[0] = middle + rng.normal(0.0, 0.8, 2)
    for t in range(1, n):
        x[t] = middle + DRIFT * (x[t - 1] - middle) + rng.normal(0.0, 0.25, 2)
    return 1.0 / (1.0 + np.exp(-x))


def express(rng: np.random.Generator, text: str, voice: Voice, latent: np.ndarray) -> tuple[np.ndarray, int]:
    """Speak a text with the voice's valence and arousal, (2,), plus noise of this utterance.

    Returns:
        samples: (n,) float32 without silence around it, and its sampling rate in Hz.
    """
    valence, arousal = np.clip(2.0 * (latent + rng.normal(0.0, NOISE, 2)) - 1.0, -1.6, 1.6)
    samples, sampling_rate = speak(
        text,
        voice.name,
        rate=round(voice.rate * 1.25**arousal + rng.normal(0.0, 4.0)),
        pitch=round(np.clip(voice.pitch + 10.0 * arousal + 6.0 * valence + rng.normal(0.0, 2.0), 0, 100)),
        pitch_range=round(np.clip(50.0 + 30.0 * valence + rng.normal(0.0, 4.0), 0, 100)),
    )
    samples = tilt(trim(samples, sampling_rate), sampling_rate, 1.0 * arousal + 3.0 * valence + rng.normal(0.0, 0.3))
    level_db = -26.0 + voice.loudness_db + 6.0 * arousal + rng.normal(0.0, 1.0)
    samples = samples * (10.0 ** (level_db / 20.0) / np.sqrt(np.mean(samples**2)))
    return np.clip(samples, -0.99, 0.99).astype(np.float32), sampling_rate


def _make_corpus(folder: Path, n_sessions: int, seed: int) -> Path:
    lines: list[dict] = []
    progress = Progress("speak", n_sessions, "sessions")
    for index in range(n_sessions):
        voice = CORPUS_VOICES[index % len(CORPUS_VOICES)]
        lines += _speak_session(folder, f"session-{index:03d}", voice, np.random.default_rng([seed, index]))
        progress.advance(1)
    progress.close()
    manifest = folder / "manifest.jsonl"
    files.write_whole(manifest, _to_jsonl(lines))
    return manifest


def _speak_session(folder: Path, session_id: str, voice: Voice, rng: np.random.Generator) -> list[dict]:
    """Write a session's WAV and return its lines of the manifest."""
    latents = draw_latent(rng, int(rng.integers(UTTERANCES[0], UTTERANCES[1] + 1)))
    parts = [_silence(rng, SAMPLING_RATE_HZ, 0.2, 0.5)]
    at = len(parts[0])
    lines = []
    for position, latent in enumerate(latents):
        samples = resample(*express(rng, str(rng.choice(SENTENCES)), voice, latent), SAMPLING_RATE_HZ)
        parts += [samples, _silence(rng, SAMPLING_RATE_HZ, 0.2, 0.6)]
        lines.append(
            {
                "utt_id": f"{session_id}-{position:02d}",
                "session_id": session_id,
                "speaker_id": voice.speaker_id,
                "audio_path": f"audio/{session_id}.wav",
                "start_s": round(at / SAMPLING_RATE_HZ, 4),
                "end_s": round((at + len(samples)) / SAMPLING_RATE_HZ, 4),
                "position": position,
                "role": "customer",
                "split": voice.split,
                "valence": round(float(latent[0]), 4),
                "arousal": round(float(latent[1]), 4),
            }
        )
        at += len(samples) + len(parts[-1])
    path = folder / "audio" / f"{session_id}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.concatenate(parts), SAMPLING_RATE_HZ, subtype="PCM_16")
    return lines


def _make_recordings(folder: Path, n_recordings: int, seed: int) -> Path:
    calls, truth = [], []
    root = folder / "recordings"
    root.mkdir(parents=True, exist_ok=True)
    for index in range(n_recordings):
        name = f"call-{index + 1}.wav"
        # The corpus draws from [seed, 0], [seed, 1], ...
        rng = np.random.default_rng([seed, 1_000_000 + index])
        samples, turns = _speak_call(rng, CALLERS[index % len(CALLERS)])
        soundfile.write(root / name, samples, TELEPHONE_HZ, subtype="ULAW")
        calls.append({"path": name, "role_ch0": "customer", "role_ch1": "agent", "date": f"2026-03-{index + 2:02d}"})
        truth += [{"session_id": name, **turn} for turn in turns]
    files.write_whole(folder / "truth.jsonl", _to_jsonl(truth))
    files.write_whole(folder / "calls.jsonl", _to_jsonl(calls))
    return root


def _speak_call(rng: np.random.Generator, caller: Voice) -> tuple[np.ndarray, list[dict]]:
    """One call: agent and customer take turns; samples (n, 2) and the times of all speech."""
    latents = draw_latent(rng, int(rng.integers(UTTERANCES[0], UTTERANCES[1] + 1)))
    channels: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    at, turns = 0, []

    def add(channel: int, samples: np.ndarray) -> None:
        nonlocal at
        channels[channel].append(samples)
        channels[1 - channel].append(np.zeros_like(samples))
        at += len(samples)

    neutral = np.array([0.55, 0.5])
    for position, latent in enumerate(latents):
        who: list[tuple[int, Voice, tuple[str, ...], np.ndarray]] = [(0, caller, SENTENCES, latent)]
        if position % 3 == 0:
            who.insert(0, (1, AGENT, AGENT_SENTENCES, neutral))
        for channel, voice, sentences, felt in who:
            add(channel, _silence(rng, TELEPHONE_HZ, 0.5, 1.2))
            first, second = rng.choice(sentences, 2, replace=False)
            text = f"{first.rstrip('.?')}, and {second}"
            samples = resample(*express(rng, text, voice, felt), TELEPHONE_HZ)
            turns.append(
                {
                    "channel": channel,
                    "speaker_id": voice.speaker_id,
                    "start_s": round(at / TELEPHONE_HZ, 4),
                    "end_s": round((at + len(samples)) / TELEPHONE_HZ, 4),
                    "valence": round(float(felt[0]), 4),
                    "arousal": round(float(felt[1]), 4),
                }
            )
            add(channel, samples)
    add(0, _silence(rng, TELEPHONE_HZ, 0.5, 1.0))
    samples = np.stack([np.concatenate(channel) for channel in channels], axis=1)
    # A line is never digitally silent.
    return samples + rng.normal(0.0, 1e-4, samples.shape).astype(np.float32), turns


def _silence(rng: np.random.Generator, sampling_rate: int, low_s: float, high_s: float) -> np.ndarray:
    return np.zeros(int(rng.uniform(low_s, high_s) * sampling_rate), np.float32)


def _to_jsonl(lines: list[dict]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _in_own_process(function: Callable[..., Path], *arguments: Any) -> Path:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
