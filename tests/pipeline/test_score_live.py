"""A call pushed utterance by utterance, or packet by packet, has the scores of the batch job."""

import numpy as np
import pyarrow.compute as pc
import pytest
import soundfile
from scoring_cases import SMALL, make_audio_checkpoint, run, write_calls

from vaemo.audio.recording import Decoder, Recording
from vaemo.errors import ShapeError, StateMismatchError
from vaemo.live import LiveSession
from vaemo.stream import Stream

PUBLISHED = 1e-5
"""Precision to which every way of scoring agrees."""


COMPARED = {**SMALL, "model": {**SMALL["model"], "speaker_norm": ["speech", "prosody"], "session_norm": ["prosody"]}}
"""Every kind of memory that a model can have."""


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """A call, a checkpoint, and its scores: (path, checkpoint, {(channel, start): row})."""
    folder = tmp_path_factory.mktemp("call")
    (name,), _ = write_calls(folder / "recordings", utterances=8, formats=("flac",))
    checkpoint = make_audio_checkpoint(folder / "best", config=COMPARED)
    roles = {"channel_roles": ["customer", "agent"]}
    customer = run(folder / "recordings", checkpoint, folder / "customer", score=roles)
    everybody = run(folder / "recordings", checkpoint, folder / "everybody", roles_unknown=True)
    return folder / "recordings" / name, checkpoint, customer.filter(pc.equal(customer["status"], "ok")), everybody


def values(rows):
    return np.stack([rows["valence"].to_numpy(), rows["arousal"].to_numpy()], axis=1)


def predicted(predictions):
    return np.array([[p.valence, p.arousal] for p in predictions])


def packets(path, n=160):
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == 8000
    for first in range(0, len(samples), n):
        yield samples[first : first + n].T


def test_utterance_by_utterance(call):
    path, checkpoint, rows, _ = call
    stream = Stream(checkpoint)
    with Decoder() as decoder:
        recording = Recording(str(path), decoder)
        cut = [recording.utterance(row["start_s"], row["end_s"], row["channel"]) for row in rows.to_pylist()]
    found = [stream.push(samples, 16_000) for samples in cut]
    assert np.abs(predicted(found) - values(rows)).max() < PUBLISHED


@pytest.mark.parametrize("n", [160, 1111])
def test_packet_by_packet(call, n):
    path, checkpoint, rows, _ = call
    live = LiveSession(Stream(checkpoint), 8000, channels=2, listen=[0])
    found = [prediction for packet in packets(path, n) for prediction in live.push(packet)]
    assert len(found) >= len(rows) - 1, "predictions come while the call goes on"
    found += live.finish()
    assert [(p.channel, p.start_s, p.end_s) for p in found] == list(
        zip(*(rows[name].to_pylist() for name in ("channel", "start_s", "end_s")), strict=True)
    )
    assert np.abs(predicted(found) - values(rows)).max() < PUBLISHED


def test_both_channels_in_the_order_in_which_they_began(call):
    path, checkpoint, _, rows = call
    live = LiveSession(Stream(checkpoint), 8000, channels=2)
    found = [prediction for packet in packets(path) for prediction in live.push(packet)] + live.finish()
    assert [p.channel for p in found] == rows["channel"].to_pylist()
    assert np.abs(predicted(found) - values(rows)).max() < PUBLISHED


def test_a_session_goes_on_where_it_was_saved(call, tmp_path):
    path, checkpoint, rows, _ = call
    sent = list(packets(path))
    live, found = LiveSession(Stream(checkpoint), 8000, channels=2, listen=[0]), []
    for number, packet in enumerate(sent):
        if number in (1, 333, len(sent) // 2, len(sent) - 3):
            live.save(tmp_path / "memory")
            live = LiveSession(Stream(checkpoint), 8000, channels=2, listen=[0])
            live.load(tmp_path / "memory")
        found += live.push(packet)
    found += live.finish()
    assert [p.start_s for p in found] == rows["start_s"].to_pylist()
    assert np.abs(predicted(found) - values(rows)).max() < PUBLISHED


def test_what_does_not_fit_is_refused(call, tmp_path):
    live = LiveSession(Stream(call[1]), 8000, channels=2)
    with pytest.raises(ShapeError, match="a packet has 1 channels; the session was opened with 2"):
        live.push(np.zeros(160, np.float32))
    Stream(call[1]).save(tmp_path / "memory")
    with pytest.raises(StateMismatchError, match="is the memory of a Stream, not of a LiveSession"):
        live.load(tmp_path / "memory")
