"""The samples of a manifest's utterances, read when a window needs them and decoded as extraction decodes them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.audio.recording import AudioProblem, Decoder, Recording
from vaemo.config import Config
from vaemo.data.manifest import read_manifest
from vaemo.errors import ReadManifestError
from vaemo.store import FeatureStore
from vaemo.utterances import as_heard

Item = TypeVar("Item")


class Waveforms:
    """Utterances of a manifest by id; nothing is held but where they are.

    Args:
        manifest: As `read_manifest` returns it.
        utt_ids: Those that will be read.
        config: Sections `audio`, `features` and `extract`.

    Raises:
        ReadManifestError: if the manifest lacks one of them.
    """

    def __init__(self, manifest: pa.Table, utt_ids: Iterable[str], config: Config) -> None:
        places = manifest.select(["utt_id", "audio_path", "start_s", "end_s", "channel"]).to_pydict()
        every = dict(zip(places["utt_id"], zip(*list(places.values())[1:], strict=True), strict=True))
        wanted = list(utt_ids)
        missing = [utt_id for utt_id in wanted if utt_id not in every]
        if missing:
            raise ReadManifestError(
                f"the manifest lacks {len(missing):,} of the store's {len(wanted):,} utterances, such as "
                f"'{missing[0]}'; give the one that the store was extracted from."
            )
        self._places = {utt_id: every[utt_id] for utt_id in wanted}
        self._config = config
        self._decoder = Decoder(config.extract.decode_timeout_s)
        # The process that decodes ends with this object.
        weakref.finalize(self, self._decoder.close)

    @staticmethod
    def of_store(store: FeatureStore, manifest: str, config: Config) -> Waveforms:
        """The waveforms of every utterance of a store with features, decoded as at extraction.

        Args:
            store: What `jobs/extract.py` wrote.
            manifest: From which it was extracted.
            config: Section `extract`.

        Raises:
            ReadManifestError: if the manifest cannot be read, or lacks utterances of the store.
        """
        table = store.read(["utt_id", "status"])
        usable = table.filter(pc.equal(table["status"], "ok"))["utt_id"].to_pylist()
        settings = store.info["settings"]
        heard = Config.from_dict({name: settings[name] for name in ("audio", "features")})
        places = read_manifest(manifest, root=config.extract.root)
        return Waveforms(places, usable, dataclasses.replace(config, audio=heard.audio, features=heard.features))

    def read(self, utt_ids: Iterable[str]) -> list[np.ndarray]:
        """The samples of each, (n,), float32, 16 kHz. One thread at a time may read.

        Raises:
            ReadManifestError: if one that had features cannot be read any more.
        """
        places = [self._places[utt_id] for utt_id in utt_ids]
        samples: list[np.ndarray] = [np.zeros(0, np.float32)] * len(places)
        opened, recording = None, None
        # A recording is opened once for all that is cut from it.
        for number in sorted(range(len(places)), key=lambda number: (places[number][0], places[number][1] or 0.0)):
            path, start_s, end_s, channel = places[number]
            try:
                if recording is None or path != opened:
                    opened, recording = path, Recording(path, self._decoder, self._config.audio)
                samples[number] = as_heard(recording.utterance(start_s, end_s, channel), self._config)
            except AudioProblem as problem:
                raise ReadManifestError(
                    f"the store has features of {path} from {start_s or 0.0:.3f} s on, and its audio cannot be read "
                    f"now: {problem}. Put it back, or extract the store again."
                ) from None
        return samples

    def places(self) -> list[str]:
        """Where each utterance is, for fingerprints: ids, names of files without their folders, times, channels."""
        return [
            f"{utt_id}\t{path.rpartition('/')[2]}\t{start_s}\t{end_s}\t{channel}"
            for utt_id, (path, start_s, end_s, channel) in self._places.items()
        ]


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made in a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]  # it is not `end`
