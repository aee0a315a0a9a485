"""Who may be scored: customers; others only as the law allows and somebody has said so."""

import numpy as np
import pyarrow as pa
import pytest

from vaemo.config import ScoreConfig
from vaemo.errors import RolesError
from vaemo.scoring.roles import CHANNEL_ROLES, RoleRules, cut_by_vaemo

EXCEPTION = {"agents_exception": "medical", "agents_exception_reference": "DPIA 7"}


def rules(unknown=False, **settings):
    return RoleRules.of(ScoreConfig(**settings), roles_unknown=unknown)


def rows(*utterances):
    """Rows of (role, cut by vaemo, status)."""
    ids = [f"s#c0-{i:05d}" if cut else f"u{i}" for i, (_, cut, _) in enumerate(utterances)]
    n = len(utterances)
    return pa.table(
        {
            "session_id": ["s"] * n,
            "utt_id": ids,
            "channel": pa.array([0] * n, pa.int32()),
            "role": pa.array([role for role, _, _ in utterances], pa.string()),
            "status": [status for _, _, status in utterances],
            "reason": pa.nulls(n, pa.string()),
        }
    )


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(
    ("role", "cut_is_scored", "declared_is_scored"),
    [
        ("customer", True, True),
        (" Customer", True, True),
        ("agent", False, False),
        ("AGENT ", False, False),
        ("unknown", False, True),
        ("mixed", False, True),
        ("supervisor", False, False),
        ("Employee", False, False),
        ("patient", False, True),
        (None, False, True),
    ],
)
def test_by_default_only_customers_are_scored_of_recordings(role, cut, cut_is_scored, declared_is_scored):
    assert rules().scores(role, cut=cut) == (cut_is_scored if cut else declared_is_scored)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("role", ["customer", "agent", "unknown", "mixed", "supervisor", None])
def test_an_exception_lets_everybody_be_scored(role, cut):
    assert rules(**EXCEPTION).scores(role, cut=cut)


@pytest.mark.parametrize(("role", "scored"), [("unknown", True), ("mixed", True), (None, True), ("agent", False)])
def test_roles_unknown_scores_who_is_not_known_but_never_a_known_agent(role, scored):
    assert rules(unknown=True).scores(role, cut=True) == scored


def test_context_is_never_scored():
    heard = rules(context_roles=("agent",), **EXCEPTION)
    assert not heard.scores("agent", cut=True)
    assert heard.scores("customer", cut=True)


@pytest.mark.parametrize(
    ("settings", "unknown", "message"),
    [
        ({"channel_roles": "avaya"}, False, "score.channel_roles is 'avaya'; presets are amazon-connect"),
        ({"channel_roles": "twilio-dial"}, False, "whoever's call came first: give --calls"),
        ({"agents_exception": "medical"}, False, "agents_exception is medical without a reference"),
        ({**EXCEPTION, "agents_exception_reference": "  "}, False, "without a reference"),
        ({"agents_exception_reference": "DPIA"}, False, "agents_exception is not: it is one of medical"),
        ({"context_roles": ("agent",)}, False, "context_roles names 'agent'"),
        ({"channel_roles": "webex-wfo"}, True, "--roles-unknown is given beside"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, unknown, message):
    with pytest.raises(RolesError, match=message):
        rules(unknown, **settings)


@pytest.mark.parametrize("preset", CHANNEL_ROLES)
def test_presets_name_two_channels(preset):
    assert sorted(rules(channel_roles=preset).of_channels(2)) == ["agent", "customer"]


@pytest.mark.parametrize(
    ("channel_roles", "n_channels", "said", "expected"),
    [
        (("agent", "customer"), 2, (), ("agent", "customer")),
        (("agent", "customer"), 2, ("customer", "agent"), ("customer", "agent")),
        (("agent", "customer"), 2, (None, None), ("agent", "customer")),
        (("agent", "customer"), 1, (), ("mixed",)),
        (("Customer",), 1, (), ("customer",)),
        (None, 2, ("customer", "Agent "), ("customer", "agent")),
        (None, 2, ("customer",), ("customer", "unknown")),
        (None, 2, (), ("unknown", "unknown")),
        (None, 1, ("customer", None), ("customer",)),
        # One channel where two were named: whoever mixed them down mixed the agent in.
        (None, 1, ("customer", "agent"), ("mixed",)),
        (("agent", "customer"), 3, (), ("unknown", "unknown", "unknown")),
        # What the table says is of another recording: who is on which channel is not known.
        (("customer", "agent"), 2, ("agent", "customer", "supervisor"), ("unknown", "unknown")),
        (("customer",), 1, ("customer", "agent"), ("mixed",)),
    ],
)
def test_roles_of_channels(channel_roles, n_channels, said, expected):
    assert rules(channel_roles=channel_roles).of_channels(n_channels, said) == expected


def test_rows_that_may_not_be_scored_say_so():
    table = rows(("customer", True, "ok"), ("agent", True, "ok"), ("unknown", True, "too_short"), (None, False, "ok"))
    judged, context = rules().judge(table)
    assert judged["status"].to_pylist() == ["ok", "not_scored_role", "not_scored_role", "ok"]
    assert judged["reason"].to_pylist() == [None, "role agent is not scored", "role unknown is not scored", None]
    assert not context.any()


def test_context_is_what_was_usable():
    table = rows(("customer", True, "ok"), ("agent", True, "ok"), ("agent", True, "silent"))
    judged, context = rules(context_roles=("agent",), **EXCEPTION).judge(table)
    assert judged["status"].to_pylist() == ["ok", "not_scored_role", "not_scored_role"]
    assert "only moves the memory" in judged["reason"][1].as_py()
    assert context.tolist() == [False, True, False]


def test_a_recording_that_failed_keeps_its_status():
    table = rows((None, True, "undecodable"))
    table = table.set_column(2, "channel", pa.nulls(1, pa.int32()))
    assert rules().judge(table)[0]["status"].to_pylist() == ["undecodable"]


def test_utterances_that_vaemo_cut_are_known_by_their_ids():
    table = pa.table(
        {
            "session_id": ["a.wav", "a.wav", "a#c1", "a.wav", "a.wav"],
            "utt_id": ["a.wav#c0-00000", "a.wav#c1-123456", "a#c1#c1-00001", "a.wav#c0-00001", "a.wav-00001"],
            "channel": pa.array([0, 1, 1, 1, None], pa.int32()),
        }
    )
    assert cut_by_vaemo(table).tolist() == [True, True, True, False, False]


def test_recordings_without_any_role_are_refused():
    with pytest.raises(RolesError, match=r"nothing says who speaks in them.*--roles-unknown"):
        rules().require_roles(n_cut=3, known=False, calls=False)
    with pytest.raises(RolesError, match="the table of calls names no role of any"):
        rules().require_roles(n_cut=3, known=False, calls=True)
    assert RolesError("").exit_code == 2


@pytest.mark.parametrize(
    ("made", "n_cut", "known"),
    [
        (rules(), 0, False),
        (rules(), 3, True),
        (rules(channel_roles="webex-wfo"), 3, False),
        (rules(unknown=True), 3, False),
        (rules(**EXCEPTION), 3, False),
    ],
)
def test_known_roles_and_research_data_are_not_refused(made, n_cut, known):
    made.require_roles(n_cut=n_cut, known=known, calls=False)


def test_provenance_says_what_was_allowed():
    assert rules().provenance([])["roles"] == "none declared"
    facts = rules(**EXCEPTION).provenance(["agent", "customer", "agent"])
    assert facts["roles"] == ["agent", "customer"]
    assert (facts["agents_exception"], facts["agents_exception_reference"]) == ("medical", "DPIA 7")
    assert "employees may be included" in rules(unknown=True).provenance([])["notice"]
    assert np.all(["notice" not in rules().provenance([])])
