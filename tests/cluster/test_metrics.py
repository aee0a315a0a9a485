"""What is counted for the cluster's monitoring."""

import json

from vaemo.cluster import metrics


class Told:
    """Stands in for Ray's counter, which takes no zero."""

    sums: dict = {}  # noqa: RUF012 - emptied by the test

    def __init__(self, name, description, tag_keys=()):
        assert description
        self._name, self._keys = name, tag_keys

    def inc(self, value, tags=None):
        assert value > 0
        assert set(tags or {}) == set(self._keys)
        key = (self._name, *(tags or {}).values())
        self.sums[key] = self.sums.get(key, 0) + value


def test_parts_are_counted_by_what_became_of_their_utterances(monkeypatch):
    monkeypatch.setattr(metrics, "Counter", Told)
    monkeypatch.setattr(Told, "sums", {})
    job = metrics.JobMetrics()
    for statuses, audio_s in (({"ok": 3, "silent": 1}, 7.5), ({"ok": 2}, 2.5), ({"undecodable": 1}, 0.0)):
        job.add({"units": 1, "part": {"counts": json.dumps({"statuses": statuses, "audio_s": audio_s})}})
    metrics.Seconds("vaemo_worker_seconds", "spent").add(0.5)
    assert Told.sums == {
        ("vaemo_utterances", "ok"): 5,
        ("vaemo_utterances", "silent"): 1,
        ("vaemo_utterances", "undecodable"): 1,
        ("vaemo_audio_seconds",): 10.0,
        ("vaemo_parts",): 3,
        ("vaemo_worker_seconds",): 0.5,
    }
