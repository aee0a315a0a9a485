"""A live session takes any packets, finds what the batch job finds, and says in one line what it cannot take."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scoring_cases import make_checkpoint
from speech_cases import both_talk, call, tone
from stream_cases import EXTRACTORS, RATE

from vaemo.audio.vad import FRAME, UtteranceFinder
from vaemo.config import VadConfig
from vaemo.errors import ShapeError, StateMismatchError, UsageError
from vaemo.live import LiveSession
from vaemo.stream import Stream

FRAME_S = FRAME / RATE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("c") / "c", dims={"speech": 6, "speaker": 4})


@pytest.fixture
def opened(checkpoint):
    return lambda rate=RATE, **arguments: LiveSession(
        **{"stream": Stream(checkpoint, EXTRACTORS), "sampling_rate": rate, "channels": 2, **arguments}
    )


def pushed(live, samples, sizes=(8000,)):
    """What a session gives for (C, n), cut into packets of these sizes in turn, without the end."""
    found, at = [], 0
    while at < samples.shape[1]:
        size = sizes[len(found) % len(sizes)] if len(sizes) > 1 else sizes[0]
        found.append(live.push(samples[:, at : at + size]))
        at += size
    return [prediction for part in found for prediction in part]


def spans(predictions):
    return [(p.channel, p.start_s, p.end_s) for p in predictions]


def scores(predictions):
    return [(p.valence, p.arousal) for p in predictions]


def test_packets_of_any_length_give_what_the_batch_job_finds(opened):
    samples, _ = both_talk(3, seed=2)
    samples[1] += 0.1 + tone(samples.shape[1], 50.0)
    finder = UtteranceFinder(2, VadConfig())
    found = sorted([*finder.push(samples), *finder.finish()], key=lambda u: (u.start_s, u.channel))
    live = opened()
    heard = pushed(live, samples, sizes=(320, 1, 0, 777, 16_000, 5)) + live.finish()
    assert spans(heard) == [(u.channel, u.start_s, u.end_s) for u in found]
    assert len(heard) >= 4


@pytest.mark.long
@pytest.mark.parametrize("cut", [0.2, 0.47, 0.8])
def test_a_session_goes_on_where_it_was_saved_also_by_the_version_before(opened, tmp_path, cut):
    samples, _ = both_talk(3, seed=2)
    samples[1] += tone(samples.shape[1], 1000.0)
    whole = opened()
    expected = pushed(whole, samples, (1600,)) + whole.finish()
    first = opened()
    at = int(cut * samples.shape[1]) // 1600 * 1600
    found = pushed(first, samples[:, :at], (1600,))
    first.save(tmp_path / "memory")
    second = opened()
    second.load(tmp_path / "memory")
    rest = pushed(second, samples[:, at:], (1600,)) + second.finish()
    assert spans(found + rest) == spans(expected)
    assert scores(found + rest) == scores(expected)

    rewrite(tmp_path / "memory", forget_what_is_new)
    old = opened()
    old.load(tmp_path / "memory")
    assert len(pushed(old, samples[:, at:], (1600,)) + old.finish()) == len(rest)


def test_a_memory_of_a_later_version_is_refused(opened, tmp_path):
    session = opened()
    session.save(tmp_path / "memory")

    def later(tree, tensors):
        tree["version"] = 99

    rewrite(tmp_path / "memory", later)
    with pytest.raises(StateMismatchError, match=r"written by a later version of vaemo \(memory version 99"):
        opened().load(tmp_path / "memory")


def rewrite(path, change):
    """Change a memory: its tensors and the tree that names them."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tree = json.loads(metadata["live"])
    change(tree["dict"], tensors)
    save_file(tensors, path, metadata={**metadata, "live": json.dumps(tree)})


def forget_what_is_new(tree, tensors):
    del tree["sampling_rate"], tree["finished"]
    tensors.pop(tree["finder"]["dict"].pop("_floor")["array"])


def test_a_memory_with_nan_in_it_is_mended(opened, tmp_path):
    samples, _ = call(4, seed=5)
    half = samples.shape[1] // 3200 * 1600
    live = opened()
    pushed(live, samples[:, :half])
    live.save(tmp_path / "memory")

    def poison(tree, tensors):
        tensors["live.finder._level"][0] = torch.nan
        for part in range(2):
            tensors[f"live.finder._state.{part}"][:, 0] = torch.nan

    rewrite(tmp_path / "memory", poison)
    live = opened()
    live.load(tmp_path / "memory")
    later = pushed(live, samples[:, half:]) + live.finish()
    assert {p.channel for p in later if p.start_s > half / RATE} == {0, 1}
    assert all(p.status == "ok" for p in later)


@pytest.mark.parametrize("rate", [RATE, 8000])
@pytest.mark.parametrize(("bad", "n_bad"), [(np.nan, 1), (np.nan, 160), (-np.inf, 320)])
def test_what_is_no_number_costs_the_utterance_that_it_hits(opened, rate, bad, n_bad):
    samples = call(4, seed=1)[0][:, :: RATE // rate]
    whole = opened(rate)
    expected = pushed(whole, samples) + whole.finish()
    hit = expected[1]
    broken = samples.copy()
    first = round((hit.start_s + hit.end_s) / 2 * rate)
    broken[hit.channel, first : first + n_bad] = bad
    live = opened(rate)
    found = pushed(live, broken, (3210,)) + live.finish()
    assert [p.status for p in found] == ["ok", "nan_audio", *["ok"] * (len(expected) - 2)]
    assert [p.channel for p in found] == [p.channel for p in expected]
    np.testing.assert_allclose(spans(found), spans(expected), atol=1.01 * FRAME_S)
    assert found[1].valence is None
    assert "NaN or infinite" in found[1].reason


@pytest.mark.parametrize("channels", [[0], [0, 1]])
def test_what_is_no_number_costs_nothing_where_nobody_speaks(opened, channels):
    samples, spoken = call(5, seed=1)
    whole = opened()
    expected = pushed(whole, samples) + whole.finish()
    broken = samples.copy()
    broken[channels, :320] = np.nan
    pause = round((expected[0].end_s + 0.1) * RATE)
    broken[channels, pause : pause + 320] = np.inf
    if channels == [0]:
        # Ten times while the other channel speaks.
        start_s = next(start for channel, start, _ in spoken if channel == 1)
        for part in range(10):
            broken[0, round((start_s + 0.4 + 0.2 * part) * RATE) :][:320] = np.nan
    live = opened()
    found = pushed(live, broken) + live.finish()
    assert [(p.channel, p.status) for p in found] == [(p.channel, "ok") for p in expected]
    np.testing.assert_allclose(spans(found), spans(expected), atol=1.01 * FRAME_S)


def test_nan_for_seconds_ends_what_was_said_and_what_comes_then_is_heard(opened):
    samples, _ = call(6, seed=1)
    whole = opened()
    expected = pushed(whole, samples) + whole.finish()
    first, last = round((expected[1].start_s + 1) * RATE), round((expected[3].start_s + 1) * RATE)
    broken = samples.copy()
    broken[:, first:last] = np.nan
    live = opened()
    found = pushed(live, broken) + live.finish()
    usable = [p for p in found if p.status == "ok"]
    assert spans(usable)[0] == spans(expected)[0]
    np.testing.assert_allclose(spans(usable)[1:], spans(expected)[4:], atol=1.01 * FRAME_S)
    assert {p.status for p in found} == {"ok", "nan_audio"}
    assert sum(p.status == "nan_audio" for p in found) <= 2


def test_spikes_are_clipped_and_another_scale_is_refused_without_harm(opened):
    samples = call(4, seed=1)[0].astype(np.float64)
    whole = opened()
    expected = pushed(whole, samples) + whole.finish()
    spiky = samples.copy()
    spiky[:, 4000::8000] = 1e300
    live = opened()
    found = []
    for start in range(0, samples.shape[1], 3200):
        if start == 64_000:
            with pytest.raises(ShapeError, match=r"exceed 4 in magnitude.*int16 scale, it seems: divide by 32768"):
                live.push(32768 * samples[:, start : start + 3200])
        found += live.push(spiky[:, start : start + 3200])
    found += live.finish()
    assert {p.status for p in found} == {"ok"}
    assert {p.channel for p in found} == {p.channel for p in expected}
    assert np.isfinite(scores(found)).all()


def test_a_packet_may_be_of_any_kind_that_is_clear(opened):
    samples = (32767 * call(2, seed=1)[0][:1]).astype(np.int16)
    whole = opened(channels=1)
    expected = pushed(whole, samples) + whole.finish()
    assert len(expected) == 1
    kinds = {
        "flat": samples[0],
        "upright": samples.T,
        "big-endian": samples.astype(">i2"),
        "int32": samples.astype(np.int32) * 65536,
        "float32": samples / np.float32(32768),
        "float64": samples / 32768,
        "tensor": torch.from_numpy(samples),
        "list": (samples[0] / 32768).tolist(),
    }
    for name, packet in kinds.items():
        live = opened(channels=1)
        found = live.push(packet) + live.finish()
        assert (spans(found), scores(found)) == (spans(expected), scores(expected)), name


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (np.zeros(160), r"a packet has 1 channels; the session was opened with 2. A packet is .* here \(2, n\)"),
        (np.zeros((160, 2)), "a packet has 160 channels; the session was opened with 2"),
        (np.zeros((1, 2, 160)), r"a packet has the shape \(1, 2, 160\); here it is \(2, n\)"),
        (np.float32(0.5), r"a packet has the shape \(\)"),
        (np.zeros((2, 160), np.uint8), "samples are uint8. Give int16, int32, float32 or float64"),
        (None, "samples are object"),
        (b"\0\0" * 160, "samples are "),
        ([[0.0, 0.1], [0.2]], "samples of the type list make no array"),
    ],
)
def test_a_packet_that_is_not_clear_is_refused(opened, packet, message):
    with pytest.raises(ShapeError, match=message):
        opened().push(packet)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"rate": rate}, f"the sampling rate is {shown}; give a number from 2000 to 768000 Hz")
            for rate, shown in (
                ("8000", "'8000'"),
                (None, "None"),
                (True, "True"),
                (0, "0 Hz"),
                (-8000, "-8000 Hz"),
                (np.nan, "nan Hz"),
                (np.inf, "inf Hz"),
                (8, "8 Hz"),
            )
        ),
        *(({"channels": value}, "channels is .*; give how many") for value in (0, -1, 65, "2", 2.0, None, True)),
        *(
            ({"listen": value}, r"listen is .*; give one or more of the channels 0 to 1, each once")
            for value in ([5], [-1], [0, 0], [], "0", 0, [0.5], [True], [None], [[0]])
        ),
        *(
            ({"speakers": value}, r"speakers is .*; give 2 names")
            for value in (["a"], ["a", "b", "c"], ["a", "a"], "ab", ["a", None], [], 2)
        ),
        ({"stream": "run/best"}, "stream is of the type str; give a vaemo.Stream, such as"),
        ({"vad": {"min_utterance_s": 1.0}}, "vad is of the type dict; give the section vad of a vaemo.Config, or None"),
    ],
)
def test_a_session_that_cannot_be_meant_is_refused(opened, arguments, message):
    with pytest.raises(UsageError, match=message) as refused:
        opened(**arguments)
    assert len(str(refused.value).splitlines()) == 1


def test_arguments_may_come_from_numpy(opened):
    opened(np.int64(8000), channels=np.int64(2), listen=np.array([1]), speakers=("a", "b")).push(np.zeros((2, 160)))


def heard_speakers(live):
    """The names that a session gives its stream, as they come."""
    names, push = [], live.stream.push

    def listening(*args, speaker=None, **options):
        names.append(speaker)
        return push(*args, speaker=speaker, **options)

    live.stream.push = listening
    return names


def mono_call():
    both, turns = call(4)
    return both.sum(axis=0)[None], [(start_s, end_s, ("ann", "bob")[who]) for who, start_s, end_s in turns]


@pytest.mark.parametrize("cut", [None, 12.0])
def test_a_mono_stream_is_told_who_speaks_packet_by_packet(opened, tmp_path, cut):
    samples, turns = mono_call()
    size = RATE // 10
    live = opened(channels=1)
    names = heard_speakers(live)
    for at in range(0, samples.shape[1], size):
        if cut is not None and at == round(cut * RATE):
            live.save(tmp_path / "m.safetensors")
            live = opened(channels=1)
            live.load(tmp_path / "m.safetensors")
            before, names = names, heard_speakers(live)
        middle = at / RATE + 0.05
        who = next((name for start_s, end_s, name in turns if start_s - 0.3 < middle < end_s + 0.3), None)
        live.push(samples[:, at : at + size], speaker=who)
    live.finish()
    assert ([*before, *names] if cut is not None else names) == ["ann", "bob", "ann", "bob"]


def test_a_callback_says_who_speaks_and_who_is_left_out(opened):
    samples, turns = mono_call()

    def who(start_s, end_s):
        name = next(name for a, b, name in turns if a < (start_s + end_s) / 2 < b)
        return None if name == "bob" else name

    live = opened(channels=1, speaker=who)
    names = heard_speakers(live)
    heard = pushed(live, samples) + live.finish()
    assert names == ["ann", "ann"]
    assert [round(p.start_s) for p in heard] == [round(a - 0.1) for a, _, name in turns if name == "ann"]


def test_channels_tell_speakers_apart_where_there_are_several(opened):
    with pytest.raises(UsageError, match="has 2 channels"):
        opened(speaker=lambda start_s, end_s: "ann")
    with pytest.raises(UsageError, match="has 2 channels"):
        opened().push(np.zeros((2, 800), np.float32), speaker="ann")


def test_nothing_follows_the_end(opened, tmp_path):
    live = opened()
    live.push(np.zeros((2, 160)))
    assert live.finish() == []
    live.save(tmp_path / "memory")
    reopened = opened()
    reopened.load(tmp_path / "memory")
    for ended in (live, reopened):
        with pytest.raises(UsageError, match="the session is finished"):
            ended.push(np.zeros((2, 160)))
        with pytest.raises(UsageError, match="the session is finished"):
            ended.finish()


def test_the_memory_of_another_session_is_refused_whole(opened, tmp_path):
    samples, _ = call(3, seed=1)
    live = opened()
    pushed(live, samples)
    live.save(tmp_path / "memory")
    with pytest.raises(StateMismatchError, match=r"is the memory of a session with 2 channels; this one .* with 1"):
        opened(channels=1).load(tmp_path / "memory")
    other = opened(8000)
    with pytest.raises(StateMismatchError, match=r"of a session with 16000 Hz; this one .* with 8000"):
        other.load(tmp_path / "memory")
    assert other.stream.memory()[0]["state.n_steps"].numel() == 0, "nothing of it is taken"
