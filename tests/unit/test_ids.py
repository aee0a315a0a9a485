"""Ids are hidden everywhere they stand, and come out the same with the same key."""

import pyarrow as pa
import pytest

from vaemo.errors import ReadStoreError, RolesError, UsageError, VaemoError, carried, named, raise_carried
from vaemo.scoring.ids import KEY_VARIABLE, IdKey, hidden_errors

KEY = IdKey("0123456789abcdef")


def test_hashes_follow_from_key_and_id():
    assert KEY.hash("call-7") == IdKey("0123456789abcdef").hash("call-7") != IdKey("0123456789abcdeg").hash("call-7")
    assert len(KEY.hash("call-7")) == 24
    assert KEY.hash("call-7") != KEY.hash("call-8")
    assert KEY.check != IdKey("0123456789abcdeg").check


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "0123456789abcdef")
    assert IdKey.from_environment("a test").hash("x") == KEY.hash("x")
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(UsageError, match=r"a test needs a secret key in .* VAEMO_ID_KEY, which holds 5 characters"):
        IdKey.from_environment("a test")
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(UsageError, match="which is not set"):
        IdKey.from_environment("a test")


def test_no_id_is_left_in_a_row():
    reason = "broken frame in '/calls/ann-1.wav' (ann-1.wav), spoken by Ann"
    rows = pa.table(
        {
            "session_id": ["ann-1.wav", "ann-1.wav", "s2"],
            "utt_id": ["ann-1.wav#c0-00000", "first words", "s2-1"],
            "speaker_id": ["ann-1.wav#c0", "Ann", None],
            "reason": [None, reason, "too short"],
        }
    )
    hidden = KEY.hide(rows, pa.chunked_array([["/calls/ann-1.wav", "/calls/ann-1.wav", "/calls/s2.wav"]]))
    session, ann = KEY.hash("ann-1.wav"), KEY.hash("Ann")
    assert hidden["session_id"].to_pylist() == [session, session, KEY.hash("s2")]
    assert hidden["utt_id"].to_pylist() == [f"{session}#c0-00000", KEY.hash("first words"), KEY.hash("s2-1")]
    assert hidden["speaker_id"].to_pylist() == [f"{session}#c0", ann, None]
    assert hidden["reason"].to_pylist() == [
        None, f"broken frame in '{session}' ({session}), spoken by {ann}", "too short"
    ]  # fmt: skip
    assert "ann" not in str(hidden.to_pylist()).lower()


def test_errors_hide_the_ids_and_paths_they_name():
    told = f"session {named('ann')} is in two parts"
    with (
        pytest.raises(VaemoError, match=f"^session '{KEY.hash('ann')}' is in two parts$") as caught,
        hidden_errors(KEY),
    ):
        raise ReadStoreError(told)
    assert caught.value.exit_code == 1
    with pytest.raises(VaemoError) as caught, hidden_errors(KEY):
        raise RolesError(f"no role of {named('ann')}")
    assert caught.value.exit_code == 2
    with pytest.raises(ReadStoreError, match="session 'ann' is in two parts"), hidden_errors(None):
        raise ReadStoreError(told)


@pytest.mark.parametrize("name", ["O'Brien#c0-00001", "it''s", 'a"b', "a\nb", "", "'"])
def test_no_quote_in_an_id_lets_some_of_it_out(name):
    error = ReadStoreError(f"utterance {named(name)} occurs twice in '/data/{{store}}'")
    assert str(error) == f"utterance '{name}' occurs twice in '/data/{{store}}'"
    with pytest.raises(VaemoError) as caught, hidden_errors(KEY):
        raise error
    assert str(caught.value) == f"utterance '{KEY.hash(name)}' occurs twice in '/data/{{store}}'"


def test_an_error_of_another_process_is_hidden_here():
    answer = carried(ReadStoreError(f"session {named('ann')}"))
    with pytest.raises(VaemoError, match=f"session '{KEY.hash('ann')}'"), hidden_errors(KEY):
        raise_carried(answer)
    with pytest.raises(ReadStoreError, match="session 'ann'"):
        raise_carried(answer)
