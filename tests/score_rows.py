"""Rows of scores, as a model might give them."""

import numpy as np
import pyarrow as pa

from vaemo import scores


def make_utterances(seed=0, n_sessions=7, roles=("customer", "agent"), n=12):
    """Sessions of two roles in turn, a tenth of the utterances failed; ids in no alphabetical order."""
    rng = np.random.default_rng(seed)
    rows = []
    for session in rng.permutation(n_sessions):
        start = 0.0
        for i in range(n):
            start += rng.uniform(0.5, 20)
            length = rng.uniform(0.3, 6)
            ok = rng.random() > 0.1
            rows.append(
                {
                    "session_id": f"call-{session}",
                    "utt_id": f"call-{session}#{i:05d}",
                    "speaker_id": f"s{session}",
                    "role": roles[i % len(roles)],
                    "position": i,
                    "start_s": start,
                    "end_s": start + length,
                    "valence": rng.random() if ok else None,
                    "arousal": rng.random() if ok else None,
                    "status": "ok" if ok else "too_short",
                    "reason": None if ok else "no sample above -60 dB",
                    "run_id": "0123456789ab",
                }
            )
            start += length
    return scores.conform(pa.Table.from_pylist(rows))
