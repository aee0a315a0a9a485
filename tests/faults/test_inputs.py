"""What hangs its decoder, kills it, or crashes an extractor each time is a row each; the job and the others go on."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import ray
from extract_cases import CONFIG, expected_rows, make_loud, rows_of, write_corpus, write_rows

import vaemo

pytestmark = pytest.mark.ray

TIMEOUT_S = 6.0
"""Of a decode, in place of two minutes; starting the decoder on a busy machine takes some seconds of it."""

CRASHING = Path(__file__).parents[1] / "crashing"
"""Where an openSMILE lies that crashes on loud speech."""

KILLER = """
import os, signal, sys

def strike(event, arguments):
    if event == "open" and str(arguments[0]).endswith("killer.wav"):
        os.kill(os.getpid(), signal.SIGSEGV)

if any(argument.endswith("decode.py") for argument in sys.orig_argv):
    sys.addaudithook(strike)
"""
"""Run by Python itself at the start of every process of the job: the decoder dies when it opens one file."""


@pytest.fixture
def deadly_ray(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    spec = importlib.util.spec_from_file_location("opensmile", CRASHING / "opensmile.py")
    monkeypatch.setitem(sys.modules, "opensmile", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["opensmile"])
    ray.shutdown()
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(CRASHING)])}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


def test_input_that_hangs_or_kills_becomes_rows(deadly_ray, tmp_path):
    folder = tmp_path / "c"
    manifest, rows = write_corpus(folder, 6)
    make_loud(folder / "2.wav", 3200, 5600)
    for session, name in ((1, "killer.wav"), (4, "hangs.wav")):
        for row in rows:
            if row["session_id"] == f"s{session}":
                row["audio_path"] = name
    os.rename(folder / "1.wav", folder / "killer.wav")
    # A pipe into which nobody writes: opening it never returns.
    os.mkfifo(folder / "hangs.wav")
    write_rows(folder, rows)
    changes = {"extract": {"decode_timeout_s": TIMEOUT_S, "max_failed_fraction": 0.5}}
    config = CONFIG.replace({**changes, "features": {"prosody": "egemaps"}})
    vaemo.extract(config=config, out=str(tmp_path / "out"), manifest=str(manifest))

    found = rows_of(tmp_path / "out")
    assert len(found) == len(rows)
    for number, (status, reason) in {
        1: ("undecodable", "decoding it ended the decoder (SIGSEGV)"),
        4: ("timeout", f"decoding took longer than {TIMEOUT_S:g} s"),
    }.items():
        said = {(row["status"], row["reason"]) for row in found.values() if row["session_id"] == f"s{number}"}
        assert said == {(status, reason)}
    assert found["s2-1"]["status"] == "undecodable"
    assert found["s2-1"]["reason"] == "egemaps ended its process on it (SIGKILL)"

    healthy, _ = write_corpus(tmp_path / "healthy", 6)
    expected = expected_rows(healthy, config)
    for name, row in found.items():
        if row["session_id"] not in {"s1", "s4"} and name != "s2-1":
            assert {**row, "audio_path": ""} == {**expected[name], "audio_path": ""}
