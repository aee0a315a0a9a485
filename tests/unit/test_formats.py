import pytest

from vaemo.audio.formats import AUDIO_SUFFIXES, foreign_reason, headerless, kind_of, suffix_of
from vaemo.config import HEADERLESS_CODECS, AudioConfig, Config, Headerless
from vaemo.errors import ConfigValueError

RAW = AudioConfig(headerless="s16le:8000:2")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((f"a/{stem}{suffix}", "audio") for stem in ("call", "_x", "c.d") for suffix in (".wav", ".MKV", ".Alaw")),
        *((f"a{suffix}", "audio") for suffix in (".mov", ".avi", ".ts", ".mp2", ".mpga", ".m4b", ".wave", ".wav49")),
        *((f"a{suffix}", "audio") for suffix in (".ulaw", ".alaw", ".sln", ".sln16", ".vox", ".gsm", ".g723", ".g729")),
        *((f"a{suffix}", "audio") for suffix in (".amr", ".awb", ".G722", ".g726-32", ".sph", ".wv", ".aifc", ".m2ts")),
        *((f"a{suffix}", "foreign") for suffix in (".nmf", ".NMX", ".pgp", ".wav.gpg", ".gpg", ".p7m", ".aes", ".age")),
        *((f"a{suffix}", "foreign") for suffix in (".m4p", ".aax", ".wav.gz", ".mp3.zip", ".raw.bz2", ".ds2")),
        *(
            (f"a{suffix}", "other")
            for suffix in (".txt", ".zip", ".tar.gz", ".csv.gpg", ".xml", ".jpg", "", ".wav.part")
        ),
        *((name, "other") for name in ("a.raw", "a.PCM", ".wav", "a.wav/b")),
    ],
)
def test_the_suffix_tells_what_a_file_is(name, kind):
    assert kind_of(name, AudioConfig()) == kind
    assert (foreign_reason(name) is not None) == (kind == "foreign")


def test_raw_files_are_recordings_only_where_the_config_says_how_they_are_read():
    assert {kind_of(name, RAW) for name in ("a.raw", "b.PCM")} == {"audio"}
    assert headerless("x/a.RAW", RAW) == Headerless("s16le", 8000, 2)
    assert headerless("x/a.raw", AudioConfig()) is None


def test_a_reason_says_what_it_is_and_what_to_do():
    assert foreign_reason("x/call.wav.gpg") == (
        "it is encrypted (OpenPGP, as .gpg says); decrypt it, and give what comes out"
    )
    assert "NICE" in foreign_reason("call.nmf")
    assert "export it as WAV" in foreign_reason("call.nmf")


def test_headerless_formats_are_read_by_their_convention():
    assert headerless("a.ULAW", RAW) == Headerless("mulaw", 8000, 1)
    assert headerless("a.sln44", RAW).sampling_rate == 44100
    assert headerless("a.vox", AudioConfig(vox_rate_hz=6000)).sampling_rate == 6000
    assert headerless("a.wav", RAW) is None
    formats = [headerless(f"a{suffix}", RAW) for suffix in AUDIO_SUFFIXES]
    assert all(found.codec in HEADERLESS_CODECS for found in formats if found)


def test_a_suffix_is_that_of_the_last_part_of_a_path():
    assert suffix_of("s3://b/x.d/A.WaV") == ".wav"
    assert suffix_of("x.d/a") == suffix_of(".wav") == ""


@pytest.mark.parametrize("text", ["s16le", "s16le:8", "s16le:8000:0", "s16le:8000:1:1", "s17le:8000", "mulaw:8k"])
def test_what_does_not_say_how_to_read_is_refused(text):
    with pytest.raises(ConfigValueError, match=r"audio.headerless is .*; give CODEC:RATE or CODEC:RATE:CHANNELS"):
        Config.load("default", [f"audio.headerless={text}"])
