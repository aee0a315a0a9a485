"""Measures what is lost where the two channels of a call are summed to one and its voices are told apart again.

    PYTHONPATH=tests python tests/perf/mono_scores.py --checkpoint DEMO/run/best --out FOLDER --calls 24

The calls are the demo's, of speakers that its model does not know. The agent is enrolled from calls that are not
scored. Prints bias and mean absolute error of the customer's mean valence and arousal in each call, mono against two
channels, with 95 % intervals over calls; and CCC of turns against their labels, both ways, over the turns that both
have scored.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import torch

import vaemo
from vaemo.config import Config
from vaemo.demo.corpus import make_recordings
from vaemo.files import write_parquet_whole
from vaemo.metrics import ccc
from vaemo.scores import read_sessions, read_utterances
from vaemo.units import DIMENSIONS
from vaemo.voices.enrol import enrol

ENROLLED_CALLS = 2
DRAWS = 2000


def prepare(out, n_calls):
    """Folders `two` and `mono`, their tables of calls, and the agent's voice."""
    folder = out / "calls"
    if not (folder / "truth.jsonl").exists():
        make_recordings(folder, n_recordings=n_calls + ENROLLED_CALLS, seed=7)
    paths = sorted((folder / "recordings").glob("*.wav"), key=lambda path: int(path.stem.split("-")[1]))
    for name in ("two", "mono", "agents/agent"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        samples, rate = soundfile.read(path, dtype="float32")
        if number < ENROLLED_CALLS:
            soundfile.write(out / "agents/agent" / path.name, samples[:, 1], rate, subtype="ULAW")
            continue
        soundfile.write(out / "two" / path.name, samples, rate, subtype="ULAW")
        soundfile.write(out / "mono" / path.name, samples.sum(axis=1), rate, subtype="ULAW")
    names = [path.name for path in paths[ENROLLED_CALLS:]]
    roles = {"role_ch0": ["customer"] * len(names), "role_ch1": ["agent"] * len(names)}
    write_parquet_whole(str(out / "two.parquet"), pa.table({"session_id": names, **roles}))
    write_parquet_whole(str(out / "mono.parquet"), pa.table({"session_id": names, "agent_id": ["agent"] * len(names)}))
    enrol(str(out / "agents")).write(str(out / "agents.parquet"))
    return [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]


def turns_scored(scores, truth):
    """Mean scores of the utterances that lie in each turn of a customer, (turns, 2); NaN where there is none."""
    rows = read_utterances(str(scores)).to_pylist()
    found = np.full((len(truth), len(DIMENSIONS)), np.nan)
    by_call = {}
    for row in rows:
        if row["valence"] is not None and row["role"] == "customer":
            by_call.setdefault(row["session_id"], []).append(row)
    for number, turn in enumerate(truth):
        inside = []
        for row in by_call.get(turn["session_id"], ()):
            shared = min(row["end_s"], turn["end_s"]) - max(row["start_s"], turn["start_s"])
            if shared > (row["end_s"] - row["start_s"]) / 2:
                inside.append((shared, [row[name] for name in DIMENSIONS]))
        if inside:
            found[number] = np.average([held for _, held in inside], axis=0, weights=[shared for shared, _ in inside])
    return found


def interval(values, statistic):
    draw = np.random.default_rng(0)
    drawn = [statistic(values[draw.integers(len(values), size=len(values))]) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{statistic(values):+.3f} [{low:+.3f}, {high:+.3f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    truth = [turn for turn in prepare(args.out, args.calls) if turn["channel"] == 0]
    config = Config().replace({"features": {"opensmile_license": "research"}})
    means, scored = {}, {}
    for name, options in {
        "two": {},
        "mono": {"speakers": args.out / "agents.parquet", "set": ["voices.mode=auto"]},
    }.items():
        out, table = args.out / f"scores-{name}", args.out / f"{name}.parquet"
        where = {"input": args.out / name, "checkpoint": args.checkpoint, "out": out, "calls": table}
        vaemo.score(**where, config=config, executor="process", **options)
        rows = [row for row in read_sessions(str(out)).to_pylist() if row["role"] == "customer" and row["n_scored"]]
        means[name] = {row["session_id"]: [row[f"{dim}_mean"] for dim in DIMENSIONS] for row in rows}
        scored[name] = turns_scored(out, truth)
    both = sorted(means["two"].keys() & means["mono"].keys())
    counts = [len(means["two"]), len(means["mono"]), len(both)]
    print("calls with a scored customer: two channels {}, mono {}, both {}".format(*counts))
    difference = np.array([means["mono"][call] for call in both]) - np.array([means["two"][call] for call in both])
    kept = np.isfinite(scored["two"]).all(axis=1) & np.isfinite(scored["mono"]).all(axis=1)
    known = np.isfinite(scored["two"]).all(axis=1)
    print(f"turns of customers {len(truth)}: scored of two channels {known.sum()}, of both {kept.sum()}")
    for column, dim in enumerate(DIMENSIONS):
        values = difference[:, column]
        labels = np.array([turn[dim] for turn in truth])
        ccc_of = {name: ccc(scored[name][kept, column], labels[kept]) for name in scored}
        print(
            f"{dim}: bias {interval(values, np.mean)}, MAE {interval(np.abs(values), np.mean)}; CCC against labels "
            f"two channels {ccc_of['two']:.3f}, mono {ccc_of['mono']:.3f}"
        )


if __name__ == "__main__":
    main()
