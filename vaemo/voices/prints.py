"""Voiceprints: enrolled voices of persons, in the file that `vaemo enrol` writes and `--speakers` reads.

A Parquet file with `speaker_id`, `speaker` (the vector), `role`, `expires` (a date, or null) and `seconds` (of speech).
The encoder's fingerprint is in its metadata. An entry is personal data of a special kind; `without` erases a person.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vaemo import files
from vaemo.data.speakers import unit
from vaemo.errors import ColumnError, ReadVoicesError, named
from vaemo.features.campplus import CampPlus
from vaemo.tables import length_of_vectors, typed, vectors

_ENCODER = b"vaemo.encoder"


@dataclass(frozen=True, eq=False)
class Voiceprints:
    """Persons whose voices are known, N of them.

    Attributes:
        persons: Their ids, all different.
        roles: What each is in calls, such as `agent`.
        expires: Last day on which each may be used, or None.
        seconds: Of speech that each was made of; NaN where it is not known.
        vectors: (N, D), unit length.
        encoder: Fingerprint of the encoder that made them.
    """

    persons: Sequence[str]
    roles: Sequence[str]
    expires: Sequence[datetime.date | None]
    seconds: Sequence[float]
    vectors: np.ndarray
    encoder: str

    @staticmethod
    def read(path: str, encoder: str) -> Voiceprints:
        """What a file holds.

        Args:
            path: The file.
            encoder: Fingerprint of the encoder used for the calls.

        Raises:
            ReadVoicesError: if it cannot be read, lacks a column, names a person twice, has a date that is none, a
                vector that is no vector, or was made with another encoder.
        """
        try:
            table = files.read_parquet(path)
        except (OSError, pa.ArrowException) as error:
            raise ReadVoicesError(
                f"the voices {path} cannot be read ({' '.join(str(error).split())}); give a file of `vaemo enrol`."
            ) from None
        missing = [name for name in ("speaker_id", "speaker", "role") if name not in table.column_names]
        if missing:
            raise ReadVoicesError(
                f"{path} lacks the column {missing[0]}; to tell who speaks, voices have speaker_id, speaker and role, "
                "and may have expires. `vaemo enrol` makes such a file."
            )
        made_by = (table.schema.metadata or {}).get(_ENCODER, b"").decode()
        if made_by != encoder:
            raise ReadVoicesError(
                f"{path} was made with {'the encoder ' + made_by if made_by else 'an encoder that it does not name'}; "
                f"calls use {encoder} (voices.model). Enrol again."
            )
        try:
            persons = typed(table["speaker_id"], "speaker_id", pa.string()).to_pylist()
            roles = typed(table["role"], "role", pa.string()).to_pylist()
            dim = length_of_vectors(table["speaker"], "speaker") or 0
            held = vectors(table["speaker"], "speaker", dim)
        except ColumnError as error:
            raise ReadVoicesError(f"{path}: {error}.") from None
        if None in persons or None in roles or held.null_count:
            raise ReadVoicesError(f"{path} has an entry without speaker_id, role or speaker; drop or complete it.")
        if repeated := [person for person in dict.fromkeys(persons) if persons.count(person) > 1]:
            raise ReadVoicesError(f"{path}: {named(repeated[0])} occurs more than once; one entry a person is needed.")
        matrix = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in held.chunks] or [[]])
        matrix = matrix.reshape(len(persons), dim).astype(np.float32)
        if not np.isfinite(matrix).all() or not matrix.any(axis=1).all():
            raise ReadVoicesError(f"{path} has a vector that is zero, or not finite; enrol that person again.")
        dates = table["expires"].to_pylist() if "expires" in table.column_names else [None] * len(persons)
        seconds = table["seconds"].to_pylist() if "seconds" in table.column_names else [np.nan] * len(persons)
        return Voiceprints(
            persons,
            [role.strip().lower() for role in roles],
            [day_of(date, f"{path}: {person}") for date, person in zip(dates, persons, strict=True)],
            [np.nan if value is None else float(value) for value in seconds],
            unit(matrix),
            made_by,
        )

    def write(self, path: str) -> None:
        """Write the file, whole."""
        dim = self.vectors.shape[1] if self.vectors.size else 1
        table = pa.table(
            {
                "speaker_id": pa.array(self.persons, pa.string()),
                "speaker": pa.FixedSizeListArray.from_arrays(pa.array(self.vectors.reshape(-1), pa.float32()), dim),
                "role": pa.array(self.roles, pa.string()),
                "expires": pa.array(self.expires, pa.date32()),
                "seconds": pa.array(self.seconds, pa.float64()),
            }
        )
        files.write_parquet_whole(path, table.replace_schema_metadata({_ENCODER: self.encoder.encode()}))

    def without(self, persons: Sequence[str]) -> Voiceprints:
        """The others."""
        return self._select([row for row, person in enumerate(self.persons) if person not in set(persons)])

    def valid(self, today: datetime.date) -> Voiceprints:
        """Those that have not expired."""
        return self._select([row for row, day in enumerate(self.expires) if day is None or day >= today])

    def joined(self, other: Voiceprints) -> Voiceprints:
        """These and others, who replace entries of the same persons."""
        kept = self.without(other.persons)
        return Voiceprints(
            [*kept.persons, *other.persons],
            [*kept.roles, *other.roles],
            [*kept.expires, *other.expires],
            [*kept.seconds, *other.seconds],
            np.concatenate([kept.vectors.reshape(-1, other.vectors.shape[1]), other.vectors]),
            other.encoder,
        )

    def _select(self, rows: Sequence[int]) -> Voiceprints:
        return Voiceprints(
            [self.persons[row] for row in rows],
            [self.roles[row] for row in rows],
            [self.expires[row] for row in rows],
            [self.seconds[row] for row in rows],
            self.vectors[list(rows)],
            self.encoder,
        )


def valid_prints(path: str) -> Voiceprints:
    """The voices in a file that have not expired; errors as `Voiceprints.read`."""
    return Voiceprints.read(path, CampPlus.made_by).valid(datetime.date.today())


def day_of(value: object, where: str) -> datetime.date | None:
    """A date as files hold it; None where there is none.

    Raises:
        ReadVoicesError: if it is no date.
    """
    if value is None or value == "":
        return None
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(str(value)[:10])
    except ValueError:
        raise ReadVoicesError(f"{where} expires on {value!r}; give a date such as 2027-01-31.") from None
