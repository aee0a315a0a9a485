"""Roles of voices: by positive evidence alone, in its order, and unknown otherwise."""

import dataclasses
import datetime

import numpy as np
import pytest

from vaemo.config import VoicesConfig
from vaemo.errors import ReadVoicesError
from vaemo.voices.channels import Voice
from vaemo.voices.prints import Voiceprints
from vaemo.voices.roles import Evidence, VoiceRole, expected_voice, of_piece, roles_of_voices

DIM = 192
CONFIG = VoicesConfig()


def near(axis, likeness=1.0):
    """A vector that is so much like an axis, and like no other of the first ten."""
    vector = np.zeros(DIM, np.float32)
    vector[axis], vector[50 + axis] = likeness, np.sqrt(1 - likeness**2)
    return vector


def prints(*axes, roles=None, expires=None):
    n = len(axes)
    persons = [f"p{axis}" for axis in axes]
    vectors = np.stack([near(axis) for axis in axes])
    return Voiceprints(persons, roles or ["agent"] * n, expires or [None] * n, [60.0] * n, vectors, "e")


def decided(voices, channel_roles=("mixed",), evidence=Evidence(), enrolled=None, **settings):  # noqa: B008
    found = roles_of_voices(voices, channel_roles, evidence, enrolled, dataclasses.replace(CONFIG, **settings))
    return [found[voice.channel, voice.number] for voice in voices]


def voices(*vectors, speech_s=30.0):
    return [Voice(0, number, speech_s, vector) for number, vector in enumerate(vectors)]


TWO = voices(near(1, 0.9), near(2, 0.9))
UNKNOWN = VoiceRole("unknown")
P1 = Evidence(agent_id="p1")


def test_nothing_said_is_unknown():
    assert decided(TWO) == [UNKNOWN, UNKNOWN]


def test_a_table_of_calls_goes_before_everything():
    brought = [dataclasses.replace(TWO[0], role="agent"), TWO[1]]
    said = Evidence(("Customer ", None), "p1")
    assert decided(brought, ("agent",), said, prints(1)) == [VoiceRole("customer", "calls"), UNKNOWN]


def test_roles_that_were_brought():
    brought = [dataclasses.replace(TWO[0], role="agent"), TWO[1]]
    assert decided(brought, evidence=P1, enrolled=prints(1)) == [VoiceRole("agent", "voices_from"), UNKNOWN]


def test_the_verified_agent_leaves_the_customer():
    agent, customer = decided(TWO, evidence=P1, enrolled=prints(1))
    assert (agent.role, agent.by) == ("agent", "verified")
    assert (customer.role, customer.by) == ("customer", "verified")
    assert agent.margin == customer.margin == pytest.approx(0.9)


def unknown(roles):
    """Whether no role is known, and why."""
    assert [dataclasses.replace(role, why=None) for role in roles] == [UNKNOWN] * len(roles)
    return roles[0].why


@pytest.mark.parametrize(
    ("heard", "evidence", "enrolled", "why"),
    [
        (TWO, Evidence(agent_id="p7"), prints(1), "no voice of its agent_id"),  # a new hire
        (TWO, Evidence(), prints(1), "it has no agent_id"),  # to find out who it was would be identification
        (voices(near(1, 0.45), near(2, 0.9)), P1, prints(1), "similarity of 0.45"),  # a cold
        (voices(near(1, 0.95), near(1, 0.9)), P1, prints(1), "leads by 0.05"),  # both are alike
        (voices(near(3, 0.9), near(2, 0.9)), P1, prints(1), "similarity of 0.00"),  # somebody else took the call
        (TWO, P1, prints(1, roles=["customer"]), "no voice of its agent_id"),
        (voices(near(1, 0.9), near(2, 0.9), speech_s=2.0), P1, prints(1), "speaks for 3 s"),
        (voices(None, None), P1, prints(1), "speaks for 3 s"),
    ],
)
def test_what_is_not_verified_is_unknown(heard, evidence, enrolled, why):
    assert why in unknown(decided(heard, evidence=evidence, enrolled=enrolled))


def test_the_other_is_the_customer_only_where_there_are_two():
    heard = voices(*[near(axis, 0.9) for axis in (1, 2, 3)])
    agent, *others = decided(heard, evidence=P1, enrolled=prints(1))
    assert (agent.role, agent.why) == ("agent", None)
    assert "of 3 voices" in unknown(others)


def test_one_voice_is_not_verified_since_it_may_be_two_that_are_alike():
    assert "one voice was found" in unknown(decided(voices(near(1, 0.95)), evidence=P1, enrolled=prints(1)))


def test_a_short_third_voice_counts():
    heard = [*TWO, Voice(0, 2, 1.0, near(5))]
    assert [role.role for role in decided(heard, evidence=P1, enrolled=prints(1))] == ["agent", "unknown", "unknown"]


def test_identification_needs_its_reference_and_a_margin_over_other_persons():
    agent, customer = decided(TWO, enrolled=prints(1, 4), identification="DPIA 12")
    assert (agent.role, agent.by, customer.role) == ("agent", "identified", "customer")
    twins = prints(1, 4)
    twins.vectors[1] = near(1, 0.99)
    assert "leads by 0.05" in unknown(decided(TWO, enrolled=twins, identification="DPIA 12"))
    assert "it has no agent_id" in unknown(decided(TWO, enrolled=prints(1, 4), identification="  "))


def test_who_is_expected_is_the_agent_that_is_named_and_nobody_else():
    vector = expected_voice(P1, prints(1, 2), CONFIG)
    np.testing.assert_array_equal(vector, near(1))
    identified = dataclasses.replace(CONFIG, identification="DPIA 12")
    for evidence, enrolled, config in (
        (P1, None, CONFIG),
        (P1, prints(2), CONFIG),
        (P1, prints(1, roles=["customer"]), CONFIG),
        (Evidence(), prints(1), CONFIG),
        (P1, prints(1), identified),
    ):
        assert expected_voice(evidence, enrolled, config) is None


def test_a_line_is_one_partys_and_a_mix_is_nobodys():
    assert decided(TWO, ("customer",)) == [UNKNOWN, UNKNOWN]
    assert decided(TWO[:1], ("customer",)) == [VoiceRole("customer", "channel")]
    lines = [Voice(0, 0, 9.0), Voice(0, 1, 9.0), Voice(1, 0, 9.0)]
    assert [role.role for role in decided(lines, ("customer", "agent"))] == ["customer", "customer", "agent"]


def test_uncertain_speech_is_unknown_but_on_a_line_of_its_own():
    sure = VoiceRole("customer", "verified", 0.4)
    assert of_piece(sure, CONFIG.min_margin, CONFIG) is sure
    assert of_piece(sure, None, CONFIG) is sure
    assert of_piece(sure, CONFIG.min_margin / 2, CONFIG) == UNKNOWN
    line = VoiceRole("customer", "channel")
    assert of_piece(line, 0.0, CONFIG) is line


def test_voiceprints_are_read_back_expire_and_are_erased(tmp_path):
    path, today = str(tmp_path / "v.parquet"), datetime.date(2026, 11, 28)
    prints(1, 2, 3, expires=[None, today, today - datetime.timedelta(1)]).write(path)
    held = Voiceprints.read(path, "e")
    assert held.valid(today).persons == ["p1", "p2"]
    held.without(["p2"]).write(path)
    held = Voiceprints.read(path, "e").joined(prints(3, 4))
    assert held.persons == ["p1", "p3", "p4"]
    assert held.expires == [None, None, None]
    with pytest.raises(ReadVoicesError, match="made with the encoder e; calls use f"):
        Voiceprints.read(path, "f")


def test_voiceprints_that_cannot_be_used_are_refused(tmp_path):
    path = str(tmp_path / "v.parquet")
    prints(1, 1).write(path)
    with pytest.raises(ReadVoicesError, match="more than once"):
        Voiceprints.read(path, "e")
    broken = prints(1)
    broken.vectors[0] = np.nan
    broken.write(path)
    with pytest.raises(ReadVoicesError, match="not finite"):
        Voiceprints.read(path, "e")
    with pytest.raises(ReadVoicesError, match="cannot be read"):
        Voiceprints.read(str(tmp_path / "no.parquet"), "e")
