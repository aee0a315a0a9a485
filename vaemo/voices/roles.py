"""The role of a voice: only declared or verified roles count; every other voice is unknown and not scored.

In this order: the table of calls (`role_v0`, ...), those who brought the voices (`--voices-from`), a voice that matches
an enrolled one, and the channel's role where the channel is one party's line or holds one voice alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vaemo.config import VoicesConfig
from vaemo.units import MIXED, UNKNOWN
from vaemo.voices.channels import Voice, verified
from vaemo.voices.prints import Voiceprints

VoiceKey = tuple[int, int | None]
"""Channel and number of a voice; None where there is no voice."""

_LEAST_S = 3.0
"""Least speech of a voice for it to be identified."""

_TWO = 2


@dataclass(frozen=True)
class VoiceRole:
    """What a voice is.

    Attributes:
        role: `customer`, `agent`, any other that was said, or `unknown`.
        by: What decided: `calls`, `voices_from`, `verified`, `identified`, `channel`; None where nothing did.
        margin: Of verification: how much more the voice of the agent is like the enrolled one than the call's other
            voice is, or than another person's enrolment; None for other evidence.
        why: Of a role that is unknown: why no voice was verified; None where no voices are enrolled.
    """

    role: str
    by: str | None = None
    margin: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class Evidence:
    """What the table of calls says of a call's voices.

    Attributes:
        said: Roles of its voices, from `role_v0` on, null where not given.
        agent_id: Who the agent was.
    """

    said: tuple[str | None, ...] = ()
    agent_id: str | None = None


def roles_of_voices(
    voices: Sequence[Voice],
    channel_roles: Sequence[str],
    evidence: Evidence,
    enrolled: Voiceprints | None,
    config: VoicesConfig,
) -> dict[VoiceKey, VoiceRole]:
    """The role of every voice of a recording, by channel and number.

    Args:
        voices: All of the recording.
        channel_roles: Role of each channel; it is known if it is neither `unknown` nor `mixed`.
        evidence: From the table of calls.
        enrolled: Voices of persons that have not expired, or None.
        config: Thresholds, and whether persons are identified.
    """
    found: dict[VoiceKey, VoiceRole] = {(voice.channel, voice.number): VoiceRole(UNKNOWN) for voice in voices}
    one_channel = len(channel_roles) == 1
    for voice in voices:
        key, known = (voice.channel, voice.number), channel_roles[voice.channel]
        alone = sum(other.channel == voice.channel for other in voices) == 1
        said = evidence.said[voice.number] if one_channel and voice.number < len(evidence.said) else None
        if said:
            found[key] = VoiceRole(said.strip().lower(), "calls")
        elif voice.role:
            found[key] = VoiceRole(voice.role, "voices_from")
        elif known not in (UNKNOWN, MIXED) and (alone or not one_channel):
            # A separate line belongs to one party; a mix does not identify the voices in it.
            found[key] = VoiceRole(known, "channel")
    if one_channel and enrolled and not any(role.by for role in found.values()):
        found |= _verified(voices, evidence, enrolled, config)
    return found


def expected_voice(evidence: Evidence, enrolled: Voiceprints | None, config: VoicesConfig) -> np.ndarray | None:
    """What the agent's voice is like, whom the table of calls names, (D,); None where that is not known beforehand."""
    if enrolled is None or config.identification.strip() or evidence.agent_id not in enrolled.persons:
        return None
    row = enrolled.persons.index(evidence.agent_id)
    return enrolled.vectors[row] if enrolled.roles[row] == "agent" else None


def of_piece(role: VoiceRole, margin: float | None, config: VoicesConfig) -> VoiceRole:
    """The role of speech of a voice: unknown where it is not certain that the voice is that one."""
    if role.by in (None, "channel") or margin is None or margin >= config.min_margin:
        return role
    return VoiceRole(UNKNOWN)


def why_unknown(role: VoiceRole, margin: float | None, config: VoicesConfig) -> str:
    """Why speech with no role has none."""
    if role.by and margin is not None:
        return f"whose voice it is is not certain (voice_margin {margin:.2f} of {config.min_margin:g})"
    return role.why or "nothing says whose voice it is"


def _verified(
    voices: Sequence[Voice], evidence: Evidence, enrolled: Voiceprints, config: VoicesConfig
) -> dict[VoiceKey, VoiceRole]:
    """Roles by comparison with enrolled voices: the agent's, and of the other where there are two in all."""
    unknown = functools.partial(_all_unknown, voices)
    heard = [voice for voice in voices if voice.vector is not None and voice.speech_s >= _LEAST_S]
    agents = [row for row, role in enumerate(enrolled.roles) if role == "agent"]
    by = "verified"
    if config.identification.strip():
        by = "identified"
    else:
        agents = [row for row in agents if enrolled.persons[row] == evidence.agent_id]
        if not agents:
            return unknown("no voice of its agent_id is enrolled" if evidence.agent_id else "it has no agent_id")
    if len(voices) == 1:
        return unknown("one voice was found: two that are alike may not have been told apart")
    if not heard or not agents:
        return unknown(f"no voice speaks for {_LEAST_S:g} s" if agents else "no agent is enrolled")
    likeness = np.stack([voice.vector for voice in heard if voice.vector is not None]) @ enrolled.vectors[agents].T
    own, person = np.unravel_index(int(likeness.argmax()), likeness.shape)
    best = float(likeness[own, person])
    others = [*np.delete(likeness[:, person], own), *np.delete(likeness[own], person)]
    margin = best - float(max(others, default=0.0))
    if not verified(best, others, config):
        lead = f", leads by {margin:.2f} (voices.verification_margin {config.verification_margin:g})" if others else ""
        return unknown(
            "no voice is certain to be an enrolled one: the nearest has a similarity of "
            f"{best:.2f} (voices.verification {config.verification:g}){lead}"
        )
    agent = heard[own]
    found = unknown(
        f"the agent is verified, but of {len(voices)} voices: the customer is known only where there are two, and each "
        f"speaks for {_LEAST_S:g} s"
    )
    found[agent.channel, agent.number] = VoiceRole("agent", by, margin)
    if len(voices) == _TWO and len(heard) == _TWO:
        customer = heard[1 - own]
        found[customer.channel, customer.number] = VoiceRole("customer", by, margin)
    return found


def _all_unknown(voices: Sequence[Voice], why: str) -> dict[VoiceKey, VoiceRole]:
    return {(voice.channel, voice.number): VoiceRole(UNKNOWN, why=why) for voice in voices}
