"""What version 0.1.0 wrote is read, scored and gone on with, also when a later version has fields that it lacked.

`tests/golden/make.py` says what lies there. Where audio was read in making a folder (a store, scores of recordings) it
is read here and scored again; whether such a folder may go on is said by the number `reading`, not by these tests.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from golden_cases import GOLDEN, in_this_process, waves
from scoring_cases import rows_of, written
from training_cases import ablate, train

import vaemo
import vaemo.config.config
from vaemo.cluster.tune import tune
from vaemo.config import Config
from vaemo.config.fields import ALWAYS, fields_of, option, younger
from vaemo.errors import OtherRunError
from vaemo.evaluation.evaluate import evaluate
from vaemo.features import load_extractors
from vaemo.live import LiveSession
from vaemo.metrics import ccc
from vaemo.model.checkpoint import load_checkpoint, save_checkpoint
from vaemo.model.state import SessionState
from vaemo.personalize import Personal, personalize_store
from vaemo.pipeline.extraction import claim_store
from vaemo.store import FeatureStore
from vaemo.stream import Stream
from vaemo.units import DIMENSIONS

EXACT = 1e-6
"""Predictions of the same weights from the same features."""

FROM_SAMPLES = 1e-4
"""The same from samples: libraries of signal processing choose their order of sums by the processor."""

TRAINED = 1e-3
"""Dev results after epochs in which rounding may have grown."""

SECTIONS = [field.name for field in dataclasses.fields(Config)]


def with_younger_fields(patch):
    """Every section gets a field that files of today lack; its default is not what was so before."""
    for name in SECTIONS:
        older = vaemo.config.config.SECTIONS[name]
        field = option("as now", "Younger than these files.", before="as then")
        section = dataclasses.make_dataclass(older.__name__, [("later", str, field)], bases=(older,), frozen=True)
        patch.setitem(vaemo.config.config.SECTIONS, name, section)
    sections = [(name, section, section()) for name, section in vaemo.config.config.SECTIONS.items()]
    patch.setattr(
        vaemo.config.config, "Config", dataclasses.make_dataclass("Config", sections, bases=(Config,), frozen=True)
    )


@pytest.fixture
def config(request, tmp_path, monkeypatch):
    """Of the golden files, a copy of which is the working directory."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch)
    if getattr(request, "param", None) == FURTHER:
        with_younger_fields(monkeypatch)
    return Config.load("config.yaml")


FURTHER = "further fields"
also_with_further_fields = pytest.mark.parametrize("config", ["the fields of today", FURTHER], indirect=True)


@pytest.fixture
def expected():
    return json.loads((GOLDEN / "expected.json").read_text())


def scored(source, checkpoint, out, config, **options):
    vaemo.score(input=source, checkpoint=checkpoint, out=out, config=config, **options, executor="process")
    return rows_of(out)


def assert_as_then(rows, then, *without, within=EXACT):
    """Every column of then, the predictions up to rounding; later versions may have more."""
    assert rows.num_rows == then.num_rows
    for name in set(then.column_names) - {"lost_s", "duplicate_of", *without}:
        now, was = rows[name], then[name]
        if name in DIMENSIONS or was.type == "double":
            np.testing.assert_allclose(now.to_numpy(), was.to_numpy(), atol=within, rtol=0)
        elif name == "reason":
            # Its words may change.
            assert now.is_null().equals(was.is_null())
        else:
            assert now.to_pylist() == was.to_pylist(), name


def test_a_field_that_came_later_says_what_was_so_before():
    """Without `before` every older checkpoint, store, run and sweep would be refused."""
    golden = yaml.safe_load((GOLDEN / "config.yaml").read_text())
    today = {
        f"{name}.{key}": field for name in SECTIONS for key, field in fields_of(type(getattr(Config(), name))).items()
    }
    then = {f"{name}.{key}" for name, values in golden.items() for key in values}
    assert then <= today.keys(), "a field of 0.1.0 is gone"
    nothing_said = [name for name in today.keys() - then if today[name].metadata["before"] is ALWAYS]
    assert nothing_said == []


@also_with_further_fields
@pytest.mark.parametrize("path", ["config.yaml", "run/best/config.yaml", "sweep/best.yaml"])
def test_a_config_means_what_it_meant(config, expected, path):
    loaded, saved = Config.load(path).to_dict(), yaml.safe_load((GOLDEN / path).read_text())
    for name, section in vaemo.config.config.SECTIONS.items():
        assert {key: loaded[name][key] for key in saved.get(name, {})} == saved.get(name, {})
        assert {key: loaded[name][key] for key in younger(section)} == json.loads(json.dumps(younger(section)))
    if path == "config.yaml":
        for name, fingerprint in expected["fingerprints"].items():
            assert config.fingerprint(name) == fingerprint


@also_with_further_fields
@pytest.mark.parametrize("path", ["run/best", "run-half/best", "sweep/best", "enrolled/best", "encoder/best"])
def test_a_checkpoint_is_whole(config, path):
    checkpoint = load_checkpoint(path)
    said = json.loads((GOLDEN / path / "provenance.json").read_text())
    assert checkpoint.fingerprint == said["fingerprint"]
    assert checkpoint.has_encoder == (path == "encoder/best")
    if not checkpoint.has_encoder:
        again = save_checkpoint("again", checkpoint.model, checkpoint.config, features=checkpoint.features)
        assert again == load_checkpoint("again").fingerprint == checkpoint.fingerprint


@also_with_further_fields
@pytest.mark.parametrize(
    ("then", "checkpoint", "options"),
    [
        ("scores", "run/best", {}),
        ("scores-personal", "run/best", {"personal": "personal"}),
        ("scores-enrolled", "enrolled/best", {"speakers": "enrolled/speakers.parquet"}),
    ],
)
def test_a_store_is_scored_as_then(config, then, checkpoint, options):
    rows = scored("store", checkpoint, "again", config, **options)
    assert rows["status"].to_pylist().count("ok") > 15
    assert_as_then(rows, rows_of(then))


@also_with_further_fields
def test_half_of_the_scores_go_on(config):
    before = written("scores-half")
    assert rows_of("scores-half").num_rows < rows_of("scores").num_rows
    assert_as_then(scored("store", "run/best", "scores-half", config), rows_of("scores"))
    after = written("scores-half")
    assert {path: after[path] for path in before} == before
    whole = written("scores")
    scored("store", "run/best", "scores", config)
    assert written("scores") == whole


@pytest.mark.parametrize(
    ("then", "checkpoint"), [("scores-recordings", "run/best"), ("encoder/scores", "encoder/best")]
)
def test_recordings_are_scored_as_then(config, then, checkpoint):
    if checkpoint.startswith("encoder"):
        pytest.importorskip("transformers", reason="the extra encoders is not installed")
    rows = scored("recordings", checkpoint, "again", config)
    assert "ok" in rows["status"].to_pylist()
    assert_as_then(rows, rows_of(then), "run_id", within=FROM_SAMPLES)


@also_with_further_fields
def test_a_store_of_recordings_is_scored_as_they_are(config):
    rows, then = scored("store-recordings", "run/best", "again", config), rows_of("scores-recordings")
    assert_as_then(rows, then, "run_id", within=FROM_SAMPLES)


def test_scores_are_evaluated(config):
    found = evaluate("scores", "store", "numbers", config)["pooled"]
    labels = {row["utt_id"]: row for row in FeatureStore.open("store").read().to_pylist()}
    rows = [row for row in rows_of("scores").to_pylist() if row["status"] == "ok" and row["split"] == "test"]
    for name in DIMENSIONS:
        predicted, true = (
            np.array([[row[name]] for row in those]) for those in (rows, [labels[row["utt_id"]] for row in rows])
        )
        assert found[f"ccc_{name}"] == pytest.approx(float(ccc(predicted, true)[0]), abs=EXACT)


@also_with_further_fields
def test_a_run_goes_on(config):
    lines = Path("run-half/metrics.jsonl").read_text()
    summary = train("store", "run-half", config)
    then = json.loads((GOLDEN / "run" / "summary.json").read_text())
    assert summary["epochs"] == then["epochs"] == 4
    assert summary["dev_ccc_avg"] == pytest.approx(then["dev_ccc_avg"], abs=TRAINED)
    assert Path("run-half/metrics.jsonl").read_text().startswith(lines)
    assert lines.count("\n") == 2
    rows, before = scored("store", "run-half/best", "again", config), rows_of("scores")
    np.testing.assert_allclose(rows["valence"].to_numpy(), before["valence"].to_numpy(), atol=TRAINED)


def test_a_finished_run_is_finished(config):
    whole = written("run")
    assert train("store", "run", config) == json.loads((GOLDEN / "run" / "summary.json").read_text())
    assert written("run") == whole


@also_with_further_fields
def test_a_store_is_trained_on_as_then(config):
    then = json.loads((GOLDEN / "run" / "summary.json").read_text())
    # What a store was made with it says itself, whatever the run that learns from it is told.
    made_by = {name: vaemo.config.config.SECTIONS[name] for name in ("audio", "features", "vad")}
    told = {name: {key: fields_of(kind)[key].default for key in younger(kind)} for name, kind in made_by.items()}
    assert train("store", "again", config.replace(told))["dev_ccc_avg"] == pytest.approx(
        then["dev_ccc_avg"], abs=TRAINED
    )
    now, before = (load_checkpoint(path) for path in ("again/best", "run/best"))
    assert now.features == before.features
    assert now.config.decisive(*made_by) == before.config.decisive(*made_by)


@also_with_further_fields
def test_a_sweep_goes_on(config, monkeypatch):
    pytest.importorskip("optuna", reason="the extra search is not installed")
    reported = []
    in_this_process(monkeypatch, reported.append)
    summary = tune("store", "space.yaml", "sweep-half", config, trials=2, scheduler="none")
    then = json.loads((GOLDEN / "sweep" / "summary.json").read_text())
    assert [(metrics["trial"], len(metrics["curve"])) for metrics in reported] == [(1, 3), (1, 4)]
    assert summary["best"]["trial_id"] == then["best"]["trial_id"] == "0001"
    assert summary["best"]["dev_ccc_avg"] == pytest.approx(then["best"]["dev_ccc_avg"], abs=TRAINED)
    assert Config.load("sweep-half/best.yaml") == Config.load("sweep/best.yaml")


def test_a_finished_sweep_trains_nothing(config, monkeypatch):
    pytest.importorskip("optuna", reason="the extra search is not installed")
    in_this_process(monkeypatch, lambda metrics: pytest.fail("a trial was trained"))
    then = json.loads((GOLDEN / "sweep" / "summary.json").read_text())
    now = tune("store", "space.yaml", "sweep", config, trials=2, scheduler="none")
    assert now["held_out"] is None, "that version held nothing out"
    assert {name: now[name] for name in then if name != "importance"} == {
        name: value for name, value in then.items() if name != "importance"
    }
    assert load_checkpoint("sweep/best").fingerprint == load_checkpoint(GOLDEN / "sweep" / "best").fingerprint


@also_with_further_fields
def test_a_finished_grid_trains_nothing(config, monkeypatch):
    in_this_process(monkeypatch, lambda line: pytest.fail("a cell was trained"))
    rows = ablate("store", "ablation", config, seeds=1, only=["no-state", "ridge"])
    assert [row["variant"] for row in rows] == ["full", "no-state", "ridge"]


@also_with_further_fields
def test_personal_changes_are_found_again(config):
    then = Personal.load("personal", fingerprint=load_checkpoint("run/best").fingerprint)
    personalize_store("store", "run/best", "personal", config)
    now = Personal.load("personal", fingerprint=then.fingerprint)
    assert now.index.keys() == then.index.keys()
    for name, parameters in then.parameters.items():
        for speaker, row in then.index.items():
            torch.testing.assert_close(now.parameters[name][now.index[speaker]], parameters[row], atol=TRAINED, rtol=0)


def recorded():
    import soundfile

    samples, rate = soundfile.read("recordings/call.flac", dtype="float32")
    return samples.T, rate


@also_with_further_fields
def test_a_stream_goes_on(config, expected):
    by_speaker = config.replace(
        {"sessions": {"sequence_by": "speaker"}, "features": {"speaker_aggregation": "running_mean"}}
    )
    stream, fresh = (Stream("run/best", config=by_speaker) for _ in range(2))
    stream.load("stream.safetensors")
    samples, rate = recorded()
    for channel, start_s, seconds, *then in expected["stream"]:
        cut = samples[channel, round(start_s * rate) :][: round(seconds * rate)]
        now, alone = (one.push(cut, rate, speaker=f"c{channel}") for one in (stream, fresh))
        assert [now.valence, now.arousal] == pytest.approx(then, abs=FROM_SAMPLES)
        assert [alone.valence, alone.arousal] != pytest.approx(then, abs=10 * FROM_SAMPLES), "the memory is not heard"


def test_a_state_goes_on(config, expected):
    model = load_checkpoint("run/best").model.eval()
    state = SessionState.load("state.safetensors", fingerprint=model.fingerprint)
    now, _ = model.step(waves(model.dims, 2.0), state)
    np.testing.assert_allclose(now.detach().numpy(), expected["state"], atol=EXACT, rtol=0)


@also_with_further_fields
def test_a_live_session_goes_on(config, expected):
    samples, rate = recorded()
    live = LiveSession(Stream("run/best"), rate, channels=2, vad=config.vad)
    live.load("live.safetensors")
    rest = samples[:, expected["live"]["from_sample"] :]
    found = [*live.push(rest[:, :5000]), *live.push(rest[:, 5000:]), *live.finish()]
    for prediction, (channel, status, *then) in zip(found, expected["live"]["heard"], strict=True):
        assert (prediction.channel, prediction.status) == (channel, status)
        now = [prediction.start_s, prediction.end_s, prediction.valence, prediction.arousal]
        assert now == pytest.approx(then, abs=FROM_SAMPLES)


def test_a_store_of_before_takes_further_recordings(tmp_path, monkeypatch):
    config = Config.load(GOLDEN / "config.yaml")
    extractors = load_extractors(config.features)
    claim_store(str(tmp_path), config, extractors, source="recordings", about={})
    with_younger_fields(monkeypatch)
    later = Config.load(GOLDEN / "config.yaml")
    claim_store(str(tmp_path), later, extractors, source="recordings", about={})
    with pytest.raises(OtherRunError, match=r"settings: vad\.later was 'as then', is now 'as now'\. Give"):
        claim_store(
            str(tmp_path), later.replace({"vad": {"later": "as now"}}), extractors, source="recordings", about={}
        )


@also_with_further_fields
def test_a_refusal_names_what_differs_alone(config):
    changed = config.replace({"train": {"lr": 0.5, "keep_checkpoints": 7}})
    with pytest.raises(OtherRunError, match=r"other settings: train\.lr was 0\.003, is now 0\.5\. Give another"):
        train("store", "run-half", changed)
