"""Who speaks on which channel, and who of them may be scored.

By default only the role `customer` is. In the EU, inferring the emotions of employees at work is prohibited (AI Act,
Art. 5(1)(f)) but for medical or safety reasons; a place outside its scope is the other exception. Roles come from the
config, a table of calls or the data; vendors disagree on the order of channels, so none is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.config import ScoreConfig
from vaemo.errors import RolesError
from vaemo.tables import with_column
from vaemo.units import MIXED, UNKNOWN

CHANNEL_ROLES = {
    "amazon-connect": ("customer", "agent"),
    "microsoft-foundry": ("customer", "agent"),
    "webex-wfo": ("agent", "customer"),
}
"""Roles of the channels, from the first on, where a vendor always records them in one order. Amazon Connect: the
agent is on the right, everybody else on the left. Microsoft Foundry: the user left, the agent right. Webex WFO
export: the agent left, the external party right."""

ORDER_BY_CALL = {
    "genesys-pureconnect": "its channels follow the direction of the call",
    "twilio-conference": "its first channel is whoever joined first",
    "twilio-dial": "its first channel is whoever's call came first",
}
"""Vendors whose order differs from call to call, and why: only a table of calls can say it."""

EMPLOYEES = ("agent", "employee", "operator", "representative", "staff", "supervisor", "team lead")
"""Roles of people at work. Others that the data declare, such as `child` or `patient`, are scored."""

NOT_KNOWN = (UNKNOWN, MIXED)
"""Roles of speech that vaemo cut from recordings without a declared role: in several channels, and in one."""

_SAY_ROLES = (
    "Say who speaks on which channel: --set score.channel_roles=[agent, customer] (channel 0 first), a preset "
    f"({', '.join(CHANNEL_ROLES)}), or --calls with role_ch0, role_ch1 per call. To score all channels for evaluation "
    "and engineering alone, possibly including employees, give --roles-unknown."
)


@dataclass(frozen=True)
class RoleRules:
    """Which roles are scored, which only move the state, and which are left out.

    Attributes:
        channel_roles: Role of each channel of every recording; None where that is not said once for all.
        exception: Why employees may be scored, if they may.
        reference: The user's record of that exception.
        context: Roles that move the state without being scored.
        score_unknown: Whether speech whose role is not known is scored (`--roles-unknown`).
    """

    channel_roles: tuple[str, ...] | None = None
    exception: str | None = None
    reference: str = ""
    context: frozenset[str] = frozenset()
    score_unknown: bool = False

    @staticmethod
    def of(config: ScoreConfig, *, roles_unknown: bool = False) -> RoleRules:
        """The rules that a config and `--roles-unknown` make.

        Raises:
            RolesError: for an unknown preset, one without a fixed order, an exception without its reference,
                context from speech that may not be used, or `--roles-unknown` beside known roles.
        """
        rules = RoleRules(
            channel_roles=_channel_roles(config.channel_roles),
            exception=config.agents_exception,
            reference=config.agents_exception_reference.strip(),
            context=frozenset(map(normal_role, config.context_roles)),
            score_unknown=roles_unknown,
        )
        if rules.exception and not rules.reference:
            raise RolesError(
                f"score.agents_exception is {rules.exception} without a reference. Say in score.agents_exception_"
                "reference where your record of the exception is kept; it is stored with the scores."
            )
        if rules.reference and not rules.exception:
            raise RolesError(
                "score.agents_exception_reference is given, score.agents_exception is not: it is one of medical, "
                "safety, outside_eu."
            )
        if rules.channel_roles and roles_unknown:
            raise RolesError(
                f"--roles-unknown is given beside score.channel_roles={list(rules.channel_roles)}; leave out one."
            )
        refused = sorted(role for role in rules.context if not (rules.exception or role == "customer"))
        if refused:
            raise RolesError(
                f"score.context_roles names '{refused[0]}': speech of others than customers may move the state only "
                "with score.agents_exception and its reference."
            )
        return rules

    def of_channels(self, n_channels: int, from_call: Sequence[str | None] = ()) -> tuple[str, ...]:
        """The role of every channel of a recording.

        The table of calls takes precedence, then `channel_roles` if it has as many channels as the recording. A single
        channel without a role is `mixed`, several are `unknown`.

        Args:
            n_channels: Of the recording.
            from_call: Roles in the table of calls, null where not given. Where it names channels that the recording
                has not, it is of another recording: nothing is known then.
        """
        said: Sequence[str | None] = ()
        if any(from_call):
            said = () if any(from_call[n_channels:]) else from_call
        elif self.channel_roles and len(self.channel_roles) == n_channels:
            said = self.channel_roles
        unnamed = MIXED if n_channels == 1 else UNKNOWN
        padded = [*said, *[None] * n_channels][:n_channels]
        return tuple(normal_role(role) if role else unnamed for role in padded)

    def scores(self, role: str | None, *, cut: bool) -> bool:
        """Whether an utterance is scored.

        Args:
            role: As said, or null.
            cut: Whether vaemo itself cut the utterance from a recording; others were declared in the data.
        """
        role = normal_role(role) if role else None
        if role in self.context:
            return False
        if self.exception or role == "customer":
            return True
        if cut:
            return self.score_unknown and (role is None or role in NOT_KNOWN)
        return role not in EMPLOYEES

    def judge(self, table: pa.Table) -> tuple[pa.Table, np.ndarray]:
        """Give the status `not_scored_role` to what may not be scored.

        Args:
            table: Rows with `session_id`, `utt_id`, `channel`, `role`, `status` and `reason`.

        Returns:
            table: The same rows. A recording that failed as a whole keeps its status.
            context: Rows that were usable and only move the state, (rows,), bool.
        """
        cut = cut_by_vaemo(table)
        # A recording that failed as a whole has no channel, and so no role.
        whole = table["channel"].is_null().to_numpy() & pc.not_equal(table["status"], "ok").to_numpy()
        roles, codes = _encoded(table["role"])
        usable = pc.equal(table["status"], "ok").to_numpy()
        scored = np.array([[self.scores(role, cut=c) for role in roles] for c in (False, True)]).reshape(2, -1)
        refused = ~scored[cut.astype(int), codes] & ~whole
        listens = np.array([role is not None and normal_role(role) in self.context for role in roles], np.bool_)
        reasons = pa.array([_why_not(role, in_context) for role, in_context in zip(roles, listens, strict=True)])
        mask = pa.array(refused)
        # Who listed it, and did not read it, may know more.
        told = pc.if_else(pc.equal(table["status"], "not_scored_role"), table["reason"], pa.scalar(None, pa.string()))
        why = pc.coalesce(told, reasons.take(pa.array(codes)))
        for name, value in (("status", pa.scalar("not_scored_role")), ("reason", why)):
            table = with_column(table, name, pc.if_else(mask, value, table[name]))
        return table, refused & listens[codes] & usable

    def require_roles(self, *, n_cut: int, known: bool, calls: bool) -> None:
        """Refuse recordings for which no roles are given.

        Args:
            n_cut: Sessions with speech that vaemo cut, or will cut, from recordings.
            known: Whether the data or the table of calls names any role of them.
            calls: Whether a table of calls was given.

        Raises:
            RolesError: if there is such speech and no way to know any of its roles.
        """
        if not n_cut or known or self.channel_roles or self.exception or self.score_unknown:
            return
        found = "the table of calls names no role of any of them" if calls else "nothing says who speaks in them"
        raise RolesError(f"recordings are to be scored, and {found}. Only customers are scored. {_SAY_ROLES}")

    def provenance(self, declared: Sequence[str]) -> dict[str, Any]:
        """What the scores say about roles.

        Args:
            declared: Roles that the data or the user named.
        """
        facts: dict[str, Any] = {
            "roles": sorted(set(declared)) or "none declared",
            "channel_roles": list(self.channel_roles) if self.channel_roles else None,
            "context_roles": sorted(self.context),
            "agents_exception": self.exception,
            "agents_exception_reference": self.reference or None,
            "roles_unknown": self.score_unknown,
        }
        if self.score_unknown:
            facts["notice"] = "All channels were scored without known roles: employees may be included."
        return facts


def normal_role(role: str) -> str:
    """`Customer ` and `CUSTOMER` are `customer`."""
    return role.strip().lower()


def cut_by_vaemo(table: pa.Table) -> np.ndarray:
    """Rows whose `utt_id` is `{session_id}#c{channel}-{index}`: vaemo found these utterances in a recording."""
    channel = table["channel"].cast(pa.string())
    stem = pc.binary_join_element_wise(table["session_id"], pa.scalar("#c"), channel, pa.scalar("-"), "")
    return pc.equal(pc.replace_substring_regex(table["utt_id"], r"\d+$", ""), stem).fill_null(False).to_numpy()


def _channel_roles(named: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if named is None or not isinstance(named, str):
        return tuple(map(normal_role, named)) if named else None
    if named in CHANNEL_ROLES:
        return CHANNEL_ROLES[named]
    if named in ORDER_BY_CALL:
        raise RolesError(
            f"score.channel_roles is {named}, and {ORDER_BY_CALL[named]}: give --calls with role_ch0 and role_ch1."
        )
    raise RolesError(
        f"score.channel_roles is '{named}'; presets are {', '.join(CHANNEL_ROLES)}, or give a list of roles such as "
        "[agent, customer], channel 0 first."
    )


def _why_not(role: str | None, in_context: bool) -> str:
    if in_context:
        return f"role {role} only moves the memory (score.context_roles)"
    return f"role {role or 'unknown'} is not scored"


def _encoded(column: pa.ChunkedArray) -> tuple[list[str | None], np.ndarray]:
    """The distinct values, null among them, and each row's place in them."""
    encoded = pc.dictionary_encode(column.combine_chunks(), null_encoding="encode")
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
