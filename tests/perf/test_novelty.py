"""How well novelty tells shifted calls from calls that fit, beside what the shift costs: the tables of docs/trust.md.

    pytest -m slow tests/perf/test_novelty.py -s

For every shift: what CCC average falls by, and, by session, the area under the ROC curve of novelty, of the
Mahalanobis distance and of the distance to the 10th nearest neighbour among the training utterances, and the false
alarms where 95 % of the shifted sessions are found.
"""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import soundfile

import vaemo
from vaemo import files
from vaemo.audio.acoustics import simulate_telephone
from vaemo.audio.recording import Resampler
from vaemo.config import Config
from vaemo.corpora import emodb
from vaemo.data.sessions import assemble_sessions
from vaemo.demo.corpus import make_corpus
from vaemo.evaluation.pairs import read_pairs
from vaemo.metrics import ccc
from vaemo.store import FeatureStore
from vaemo.tables import codes
from vaemo.testing import AR, LABEL_SPREAD, kalman_predictions, linear_world
from vaemo.trust.novelty import Novelty, features_of, sounds_of
from vaemo.trust.rows import mean_of

pytestmark = pytest.mark.slow


def auc(fits, shifted):
    """Area under the ROC curve, ties counting half, and the share of false alarms at 95 % found."""
    both = np.subtract.outer(shifted, fits)
    threshold = np.quantile(shifted, 0.05, method="lower")
    return (both > 0).mean() + (both == 0).mean() / 2, (fits >= threshold).mean()


def session_means(values, session):
    return mean_of(session, values, np.full(len(session), np.nan))


class Mahalanobis:
    """Mean squared distance of all streams side by side, standardised, the covariance shrunk by a tenth."""

    def __init__(self, train):
        self._middle, self._deviation = train.mean(0), np.maximum(train.std(0), 1e-6)
        x = self._standard(train)
        self._precision = np.linalg.inv(0.9 * np.cov(x, rowvar=False) + 0.1 * np.eye(x.shape[1]))

    def _standard(self, x):
        return np.clip((x - self._middle) / self._deviation, -8, 8)

    def __call__(self, x):
        x = self._standard(x)
        return np.einsum("ud,de,ue->u", x, self._precision, x)


class Neighbours(Mahalanobis):
    """Distance to the 10th nearest of 3,000 training utterances, all streams side by side, standardised."""

    def __init__(self, train):
        super().__init__(train)
        self._known = self._standard(train)[:: max(1, len(train) // 3000)]

    def __call__(self, x):
        x = self._standard(x)
        squares = (x**2).sum(1)[:, None] - 2 * x @ self._known.T + (self._known**2).sum(1)
        return np.sqrt(np.maximum(np.partition(squares, 9, axis=1)[:, 9], 0))


def report(name, cost, rows, measures):
    """Print and return the areas: of each measure, for sessions that fit and shifted ones."""
    found = {}
    for measure, judge in measures.items():
        found[measure], alarms = auc(*(judge(*each) for each in rows))
        found[f"{measure} alarms"] = alarms
    print(
        f"{name:<34} CCC {cost:+.3f}  "
        + "  ".join(f"{m} {found[m]:.2f} ({100 * found[f'{m} alarms']:.0f} %)" for m in measures)
    )
    return found


MIXINGS = {"as it was": 0.0, "10 % of another": 0.1, "20 % of another": 0.2}


def likelihood(mixing, noise, shown):
    """Log-likelihood of what a session shows, (T, D), but for what no mixing changes: innovations of the filter."""
    mean, covariance, total = np.zeros(2), np.eye(2), 0.0
    for step, x in enumerate(shown):
        if step:
            mean, covariance = AR * mean, AR[:, None] * covariance * AR + np.diag(1 - AR**2)
        spread = mixing @ covariance @ mixing.T + noise**2 * np.eye(len(x))
        off = x - mixing @ mean
        gain = np.linalg.solve(spread, np.column_stack([off, mixing @ covariance]))
        total -= (off @ gain[:, 0] + np.linalg.slogdet(spread)[1]) / 2
        mean, covariance = mean + gain[:, 1:].T @ off, covariance - covariance @ mixing.T @ gain[:, 1:]
    return total


def told(mixing, changed, noise, sessions):
    """For each session, (T, D), how much likelier what it shows is under the changed mixing: nothing tells more."""
    basis = np.linalg.qr(np.column_stack([mixing, changed]))[0]
    return np.array(
        [np.subtract(*(likelihood(basis.T @ w, noise, x @ basis) for w in (changed, mixing))) for x in sessions]
    )


def told_blindly(mixing, sessions, means):
    """For each session, how much goes with the latent that should not: what is known but for what the mixing became."""
    outside = np.eye(len(mixing)) - mixing @ np.linalg.pinv(mixing)
    return np.array(
        [(((x @ outside).T @ z / np.linalg.norm(z, axis=0)) ** 2).sum() for x, z in zip(sessions, means, strict=True)]
    )


@pytest.mark.parametrize("noise", [3.0, 7.0])
def test_mixings_that_cost_are_seen_as_far_as_they_can_be(noise):
    """Sessions of a linear world whose features show the latent in another way, by degrees, read as before.

    Beside novelty stand two judges that know the world: one that knows what the mixing became, whom no judge passes,
    and one that does not know that alone.
    """
    world = linear_world(0, sessions=(300, 100, 100), noise=noise)
    other = np.random.default_rng(99).standard_normal(world.mixing.shape)
    table = world.table
    x = np.stack(table["speech"].to_numpy())
    split = table["split"].to_numpy()
    train, dev = x[split == "train"], split == "dev"
    novelty = Novelty.of({"speech": train}, {})
    unusual, _ = novelty.unusual({"speech": x[dev]}, {})
    novelty = novelty.referred(unusual, table.filter(pa.array(dev)), from_dev=True)

    def judge(measure):
        return lambda features, session: session_means(measure(features), session)

    peers = {"Mahalanobis": judge(Mahalanobis(train)), "neighbours": judge(Neighbours(train))}
    measures = {"novelty": lambda features, session: of_calls(novelty, {"speech": features}, session), **peers}
    test = [each for each in assemble_sessions(table) if each.split == "test"]
    rows = np.concatenate([each.rows for each in test])
    session = np.repeat(np.arange(len(test)), [len(each) for each in test])
    labels = np.concatenate([each.labels for each in test])
    # Labels are the latent, but for what is cut off.
    latent = (labels - 0.5) / LABEL_SPREAD

    def agreement(features):
        moved = [
            type(each)(**{**vars(each), "streams": {"speech": features[session == n].astype(np.float32)}})
            for n, each in enumerate(test)
        ]
        predictions = kalman_predictions(world, moved)
        return float(np.mean(ccc(np.concatenate(predictions), labels))), predictions

    (fits, before), missed = agreement(x[rows]), []
    for name, share in MIXINGS.items():
        shifted, changed = (
            x[rows] + share * latent @ (other - world.mixing).T,
            (1 - share) * world.mixing + share * other,
        )
        after, predictions = agreement(shifted)
        cost = after - fits
        found = report(f"noise {noise:g}, {name}", cost, ((x[rows], session), (shifted, session)), measures)
        apart = [[every[session == n] for n in range(len(test))] for every in (x[rows], shifted)]
        means = [[(each - 0.5) / LABEL_SPREAD for each in of_all] for of_all in (before, predictions)]
        best, _ = auc(*(told(world.mixing, changed, noise, each) for each in apart)) if share else (0.5, 1)
        blind, _ = auc(*(told_blindly(world.mixing, *each) for each in zip(apart, means, strict=True)))
        print(f"    told by one who knows the change {best:.2f}, by one who does not {blind:.2f}")
        missed += [name] if cost < -0.05 and blind >= 0.9 > found["novelty"] else []
    assert not missed


def of_calls(novelty, streams, session, sounds=None):
    unusual, _ = novelty.unusual(streams, sounds or {})
    return novelty.of_calls(session_means(novelty.novelty(unusual), session))


# -- speech ------------------------------------------------------------------------------------------------------------

FOLDER = os.environ.get("VAEMO_BENCH_FOLDER")
EMODB = os.environ.get("VAEMO_BENCH_EMODB_AUDIO")
PROMPTS = os.environ.get("VAEMO_BENCH_PROMPTS", "")
MUSIC = os.environ.get("VAEMO_BENCH_MUSIC")
"""Where what was made is kept; the audio of Emo-DB; folders of prompts, by commas, and one of music, all WAV."""

SET = ["features.opensmile_license=research"]
AS_IT_IS = "as it is"


def in_noise(samples, noise, snr_db):
    """With as much of a noise that it has this ratio, over the whole."""
    noise = np.resize(noise, len(samples))
    return samples + noise * np.sqrt((samples**2).mean() / (noise**2).mean() / 10 ** (snr_db / 10))


def written(folder, rows, change):
    """A manifest of the test sessions with their audio changed."""
    corpus = os.path.dirname(rows[0]["manifest"])
    for path in sorted({row["audio_path"] for row in rows}):
        samples, rate = soundfile.read(os.path.join(corpus, path), dtype="float32")
        os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
        soundfile.write(os.path.join(folder, path), np.clip(change(samples), -1, 1), rate)
    return listed(folder, [{key: value for key, value in row.items() if key != "manifest"} for row in rows])


def listed(folder, rows):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "manifest.jsonl")
    files.write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def prompts_of(folder, per_session=10, most=100):
    """Prompts of a voice, a second and longer, as sessions."""
    found = []
    for path in sorted(Path(folder).rglob("*.wav")):
        if soundfile.info(path).duration >= 1 and len(found) < most:
            found.append(path)
    return [
        {"utt_id": f"{n}", "session_id": f"p{n // per_session}", "speaker_id": "p", "audio_path": str(path)}
        for n, path in enumerate(found[: len(found) // per_session * per_session])
    ]


def emodb_rows(folder):
    """Emo-DB's clips in turn, as ten sessions of each actor's."""
    corpus = emodb.read(Path(folder), 0.0)
    return [{**row, "audio_path": os.path.abspath(row["audio_path"])} for row in corpus.rows]


@pytest.mark.parametrize("telephone", [False, True], ids=["wide", "telephone"])
def test_shifts_of_speech_that_cost_are_seen(tmp_path, telephone):
    """The demonstration's corpus, as it was spoken or as telephones leave it: its test sessions changed, and others."""
    root = FOLDER or str(tmp_path)
    manifest = os.path.join(root, "corpus", "manifest.jsonl")
    if not os.path.exists(manifest):
        make_corpus(os.path.join(root, "corpus"))
    lines = Path(manifest).read_text(encoding="utf-8").splitlines()
    rows = [{**json.loads(line), "manifest": manifest} for line in lines]
    test = [row for row in rows if row["split"] == "test"]
    train_audio = sorted({row["audio_path"] for row in rows if row["split"] == "train"})
    voices = [soundfile.read(os.path.join(root, "corpus", path), dtype="float32")[0] for path in train_audio[:8]]
    n = min(map(len, voices))
    babble = sum(voice[:n] / voice.std() for voice in voices)
    music = music_of(MUSIC)
    shifts = {"mu-law": simulate_telephone}
    if telephone:
        shifts = {
            "babble, 10 dB": lambda x: in_noise(x, babble, 10),
            "music, 0 dB": lambda x: in_noise(x, music, 0),
            "12 dB quieter": lambda x: x / 4,
        }
    kind = "telephone" if telephone else "wide"
    manifests = {AS_IT_IS: listed(os.path.join(root, "as-it-is"), [absolute(row, root) for row in test])}
    manifests |= {name: written(os.path.join(root, slug(name)), test, change) for name, change in shifts.items()}
    if telephone:
        for folder in filter(None, PROMPTS.split(",")):
            name = f"prompts, {Path(folder).name}"
            manifests[name] = listed(os.path.join(root, slug(name)), prompts_of(folder))
        if EMODB:
            manifests["Emo-DB"] = listed(os.path.join(root, "emo-db"), emodb_rows(EMODB))
    stores = {name: os.path.join(root, f"store-{kind}-{slug(name)}") for name in manifests}
    stores["all"] = os.path.join(root, f"store-{kind}")
    settings = [*SET, f"audio.simulate_telephone={telephone}".lower()]
    for name, path in {**manifests, "all": manifest}.items():
        vaemo.extract(manifest=path, out=stores[name], set=settings, executor="process")
    run = vaemo.train(store=stores["all"], out=os.path.join(root, f"run-{kind}"), executor="process")
    checkpoint = str(run.checkpoints[0])
    novelty = Novelty.read(checkpoint)

    streams = list(novelty.streams)
    known = FeatureStore.open(stores["all"]).read()
    train = side_by_side(known.filter(pc.equal(known["split"], "train")), streams)
    measures = {
        "novelty": lambda table, session: of_calls(novelty, features_of(table, streams), session, sounds_of(table)),
        "Mahalanobis": peer(Mahalanobis(train), streams),
        "neighbours": peer(Neighbours(train), streams),
    }
    fits, found = None, {}
    for name in manifests:
        out = os.path.join(root, f"scores-{kind}-{slug(name)}")
        vaemo.score(input=stores[name], checkpoint=checkpoint, out=out, executor="process")
        table = FeatureStore.open(stores[name]).read()
        table = table.filter(pc.equal(table["status"], "ok"))
        rows = table, codes(table["session_id"])
        value = float("nan")
        if table["valence"].null_count < len(table):
            pairs = read_pairs(out, stores[name], Config())
            value = float(np.mean(ccc(pairs.prediction, pairs.label)))
        fits = fits or (value, rows)
        found[name] = report(f"{kind}, {name}", value - fits[0], (fits[1], rows), measures), value - fits[0]
    for name, (areas, cost) in found.items():
        assert not cost < -0.05 or areas["novelty"] >= 0.9, name


def music_of(folder, seconds=60):
    """A minute of the first piece there, or chords of decaying tones."""
    if folder:
        samples, rate = soundfile.read(sorted(Path(folder).rglob("*.wav"))[0], dtype="float32", always_2d=True)
        return Resampler.to_16_khz(rate).between(samples[: seconds * rate, 0])
    random, at = np.random.default_rng(0), np.arange(8000) / 16000
    chords = [random.choice([220, 262, 294, 330, 392, 440, 523], 3, replace=False) for _ in range(2 * seconds)]
    tones = [sum(np.sin(2 * np.pi * k * f * at) / k for f in chord for k in (1, 2, 3)) for chord in chords]
    return np.concatenate([tone * np.exp(-3 * at) for tone in tones]).astype(np.float32)


def absolute(row, root):
    kept = {key: value for key, value in row.items() if key != "manifest"}
    return {**kept, "audio_path": os.path.abspath(os.path.join(root, "corpus", row["audio_path"]))}


def slug(name):
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def side_by_side(table, streams):
    return np.concatenate(list(features_of(table, streams).values()), axis=1).astype(np.float64)


def peer(measure, streams):
    return lambda table, session: session_means(measure(side_by_side(table, streams)), session)
