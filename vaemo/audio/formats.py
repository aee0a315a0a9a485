"""Formats by file name: which files are recordings, and how to read those without a header.

Tells recordings from other files by suffix, whatever its case; the decoder then looks into them. Knows what the
decoders here can read, what they cannot although it is audio, and the conventions of headerless telephone formats.
"""

from __future__ import annotations

import posixpath
from typing import Literal

from vaemo.config import AudioConfig, Headerless

Kind = Literal["audio", "foreign", "other"]

_CONTAINERS = (
    *(".wav", ".wave", ".wav49", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".voc"),
    *(".sph", ".nist", ".ircam", ".sf", ".avr", ".paf", ".pvf", ".sds", ".flac", ".fla", ".ogg", ".oga", ".ogx"),
    *(".ogv", ".opus", ".spx", ".mka", ".mkv", ".mk3d", ".webm", ".weba", ".mp4", ".m4a", ".m4b", ".m4r", ".m4v"),
    *(".mov", ".qt", ".f4a", ".f4v", ".ismv", ".isma", ".3gp", ".3gpp", ".3g2", ".3gp2", ".3ga", ".mp3", ".mp2"),
    *(".mp1", ".mpa", ".mpga", ".mpega", ".m2a", ".mpg", ".mpeg", ".m2p", ".vob", ".ts", ".mts", ".m2t", ".m2ts"),
    *(".tp", ".trp", ".aac", ".adts", ".adt", ".loas", ".latm", ".ac3", ".eac3", ".ec3", ".dts", ".dtshd", ".thd"),
    *(".mlp", ".asf", ".wma", ".wmv", ".xwma", ".wtv", ".avi", ".divx", ".flv", ".nut", ".mxf", ".dv", ".dav", ".rm"),
    *(".ra", ".rmvb", ".ape", ".mac", ".wv", ".tta", ".tak", ".mpc", ".shn", ".dsf", ".qcp", ".dss", ".act", ".lbc"),
    *(".ilbc", ".amr", ".awb", ".sbc"),
)
"""Suffixes of self-describing formats that soundfile or FFmpeg reads."""

_MULAW, _ALAW, _GSM = Headerless("mulaw", 8000), Headerless("alaw", 8000), Headerless("gsm", 8000)

_HEADERLESS = {
    **dict.fromkeys((".ulaw", ".ul", ".ulw", ".mulaw", ".mu", ".pcmu"), _MULAW),
    **dict.fromkeys((".alaw", ".al", ".alw", ".pcma"), _ALAW),
    **dict.fromkeys((".sln", ".slin", ".sln8"), Headerless("s16le", 8000)),
    **{f".sln{rate // 1000}": Headerless("s16le", rate) for rate in (12000, 16000, 24000, 32000, 44100, 48000)},
    **{f".sln{rate // 1000}": Headerless("s16le", rate) for rate in (96000, 192000)},
    ".vox": Headerless("vox", 8000),
    ".gsm": _GSM,
    **dict.fromkeys((".g722", ".722"), Headerless("g722", 16000)),
    **dict.fromkeys((".g723", ".g723_1", ".g7231", ".tco", ".rco"), Headerless("g723_1", 8000)),
    **{f".g726-{8 * bits}": Headerless(f"g726_{bits}", 8000) for bits in (2, 3, 4, 5)},
    ".g726": Headerless("g726_4", 8000),
    ".g729": Headerless("g729", 8000),
}
"""Telephone formats without a header, as Asterisk, SoX and FFmpeg name them."""

_AS_SET = (".raw", ".pcm")
"""Suffixes of unknown content: read as `audio.headerless` defines, else skipped."""

AUDIO_SUFFIXES = (*_CONTAINERS, *_HEADERLESS)
"""Suffixes that are taken for recordings without any setting."""

_DECRYPT = "decrypt it, and give what comes out"
_EXPORT = "export it as WAV with the maker's software"

_ENCRYPTED = {
    **dict.fromkeys((".pgp", ".gpg"), "OpenPGP"),
    **dict.fromkeys((".p7m", ".p7e", ".smime"), "S/MIME"),
    **dict.fromkeys((".enc", ".encrypted", ".crypt"), "an unnamed method"),
    ".age": "age",
    ".aes": "AES Crypt",
}
_VENDORS = {
    **dict.fromkeys((".nmf", ".nmx"), "NICE"),
    **dict.fromkeys((".aa", ".aax", ".aaxc"), "Audible"),
    **dict.fromkeys((".dvf", ".msv"), "Sony's voice recorders"),
    ".cca": "CallCopy",
    ".ds2": "Olympus and Philips dictation machines",
}
_PROTECTED = {".m4p": "Apple's copy protection"}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar")
_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".parquet", ".xls", ".xlsx", ".pdf", ".sql", ".tar")


def kind_of(name: str, audio: AudioConfig) -> Kind:
    """What a file is to be taken for, by its suffix.

    Args:
        name: Its name, or its path.
        audio: Says how `.raw` and `.pcm` are read; without that they are passed over.

    Returns:
        `audio` where a decoder here is to read it; `foreign` where it holds a recording, as its name says, that none
        can read, so that it becomes a row `undecodable` whose reason `foreign_reason` gives; else `other`.
    """
    suffix = suffix_of(name)
    if suffix in AUDIO_SUFFIXES or (suffix in _AS_SET and audio.headerless is not None):
        return "audio"
    return "other" if foreign_reason(name) is None else "foreign"


def foreign_reason(name: str) -> str | None:
    """Why a recording of this name cannot be read, and what to do; None if its name gives no hint."""
    suffix = suffix_of(name)
    inner = suffix_of(name[: -len(suffix)]) if suffix else ""
    if suffix in _ENCRYPTED and inner not in _TABLES:
        return f"it is encrypted ({_ENCRYPTED[suffix]}, as {suffix} says); {_DECRYPT}"
    if suffix in _VENDORS:
        return f"it has a format of the maker's own ({_VENDORS[suffix]}, as {suffix} says); {_EXPORT}"
    if suffix in _PROTECTED:
        return f"it is under {_PROTECTED[suffix]} ({suffix}); give an unprotected copy"
    if suffix in _PACKED and (inner in (*AUDIO_SUFFIXES, *_AS_SET) or inner in _VENDORS):
        return f"it is packed ({suffix}); unpack it, and give what comes out"
    return None


def headerless(name: str, audio: AudioConfig) -> Headerless | None:
    """How to read a file of this name if it has no header; None for formats with a header."""
    suffix = suffix_of(name)
    if suffix in _AS_SET:
        return audio.headerless_format
    if suffix == ".vox":
        return Headerless("vox", audio.vox_rate_hz)
    return _HEADERLESS.get(suffix)


def is_unsaid(name: str, audio: AudioConfig) -> bool:
    """Whether a file of this name is raw samples by its suffix, and no setting says which."""
    return suffix_of(name) in _AS_SET and audio.headerless is None


def suffix_of(name: str) -> str:
    """The suffix of a name or a path, with its dot, in lower case; empty where there is none."""
    return posixpath.splitext(name.replace("\\", "/"))[1].lower()
