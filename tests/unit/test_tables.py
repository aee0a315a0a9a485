"""Columns from anybody mean one thing, whatever Arrow type holds them."""

import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from vaemo.errors import ColumnError
from vaemo.tables import holds_vectors, length_of_vectors, near_misses, session_order, typed, vectors

ROWS = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


class Tensor(pa.ExtensionType):
    """As Ray's tensors come where ray is imported: a type of its own over large lists."""

    def __init__(self, shape):
        self.shape = shape
        super().__init__(pa.large_list(pa.float32()), "test.tensor")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls((4,))


def with_null(type_, rows=ROWS):
    return pa.array([*rows.tolist(), None], type_)


def shaped(shape):
    parts = [{"data": row, "shape": shape} for row in ROWS.tolist()]
    return pa.array([*parts, None], pa.struct([("data", pa.large_list(pa.float32())), ("shape", pa.list_(pa.int64()))]))


VECTORS = {
    "list": with_null(pa.list_(pa.float32())),
    "large_list of float16": with_null(pa.large_list(pa.float16()), ROWS.astype(np.float16)),
    "list_view": with_null(pa.list_view(pa.float32())),
    "large_list_view of float64": with_null(pa.large_list_view(pa.float64())),
    "fixed_size_list of float64": with_null(pa.list_(pa.float64(), 4)),
    "integers": with_null(pa.list_(pa.uint8()), ROWS.astype(int)),
    "decimals": pa.array([*[[Decimal(int(x)) for x in row] for row in ROWS], None], pa.list_(pa.decimal128(8, 2))),
    "dictionary of numbers": with_null(pa.list_(pa.dictionary(pa.int8(), pa.float32()))),
    "dictionary of lists": pa.DictionaryArray.from_arrays([0, 1, 2, None], with_null(pa.list_(pa.float32()))[:3]),
    "tensor of fixed shape": pa.concat_arrays(
        [pa.FixedShapeTensorArray.from_numpy_ndarray(ROWS), pa.nulls(1, pa.fixed_shape_tensor(pa.float32(), (4,)))]
    ),
    "tensor of variable shape": shaped([4]),
    "tensor with an axis of one": shaped([1, 4]),
    "another program's tensor": pa.ExtensionArray.from_storage(Tensor((4,)), with_null(pa.large_list(pa.float32()))),
    "slice": with_null(pa.list_view(pa.float32()), np.concatenate([ROWS[:1], ROWS])).slice(1),
    "chunks": pa.chunked_array([with_null(pa.list_(pa.float32()))[:2], with_null(pa.list_(pa.float32()))[2:]]),
    "empty lists for none": pa.array([*ROWS.tolist(), []]),
}


@pytest.mark.parametrize("what", VECTORS)
def test_vectors_of_any_type_are_fixed_lists_of_float32(what):
    column = VECTORS[what]
    assert holds_vectors(column.type)
    assert length_of_vectors(column, "speech") == 4
    read = vectors(column, "speech", 4)
    assert read.type == pa.list_(pa.float32(), 4)
    assert read.to_pylist() == [*ROWS.tolist(), None]


@pytest.mark.parametrize("column", [pa.nulls(3), pa.array([[], None, None]), pa.nulls(3, pa.list_(pa.float32()))])
def test_columns_without_a_vector_are_null(column):
    assert holds_vectors(column.type)
    assert length_of_vectors(column, "speech") is None
    assert vectors(column, "speech", 4).to_pylist() == [None] * 3


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["[1, 2]"]),
        pa.array([1.0]),
        pa.array([[True, False]]),
        pa.array([["1", "2"]]),
        pa.array([[[1.0, 2.0]]]),
        pa.array([b"\0\0\0\0"]),
        pa.array([{"a": 1.0}]),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((2, 3, 4), np.float32)),
        shaped([2, 2]),
        pa.ExtensionArray.from_storage(Tensor((2, 2)), with_null(pa.large_list(pa.float32()))),
    ],
    ids=lambda column: str(column.type)[:40],
)
def test_what_is_no_vector_is_refused(column):
    with pytest.raises(ColumnError, match=r"column speech (is .*; it must be lists of numbers|holds tensors of shape)"):
        length_of_vectors(column, "speech")


def test_a_vector_of_another_length_is_named_by_its_row():
    column = pa.chunked_array([[[1.0, 2.0]], [[1.0, 2.0], [1.0]]])
    with pytest.raises(ColumnError, match="row 3: the speech vector has 1 numbers, others have 2"):
        vectors(column, "speech", 2)


TEXTS = {
    "a": ["x", "", "é", None],
    "large": pa.array(["x", "", "é", None], pa.large_string()),
    "view": pa.array(["x", "", "é", None], pa.string_view()),
    "views in chunks": pa.chunked_array([pa.array(part, pa.string_view()) for part in (["x", ""], ["é", None])]),
    "dictionary": pa.array(["x", "", "é", None]).dictionary_encode(),
    "dictionaries": pa.chunked_array([pa.array(part).dictionary_encode() for part in (["x", ""], ["é", None])]),
    "bytes": pa.array([b"x", b"", "é".encode(), None]),
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_of_any_type_is_text_and_empty_text_is_none(what):
    read = typed(pa.array(TEXTS[what]) if what == "a" else TEXTS[what], "role", pa.string())
    assert read.type == pa.string()
    assert read.to_pylist() == ["x", None, "é", None]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([7, None, 2**62], ["7", None, str(2**62)]),
        (np.array([7, 255], np.uint8), ["7", "255"]),
        ([7.0, float("nan"), -2.0], ["7", None, "-2"]),
        ([Decimal("12.00"), None, Decimal("-3.00")], ["12", None, "-3"]),
        (pa.array([b"\0" * 16], pa.uuid()), ["00000000-0000-0000-0000-000000000000"]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_ids_may_be_whole_numbers(values, texts):
    assert (
        typed(pa.array(values) if not isinstance(values, pa.Array) else values, "utt_id", pa.string()).to_pylist()
        == texts
    )


@pytest.mark.parametrize(
    ("values", "type_", "numbers"),
    [
        ([1, None], pa.float64(), [1.0, None]),
        (np.array([1.5, np.nan], np.float16), pa.float32(), [1.5, None]),
        ([Decimal("1.5"), None], pa.float64(), [1.5, None]),
        ([1.0, np.nan, -2.0], pa.int32(), [1, None, -2]),
        (["1.5", " 2", "", None, ".5", "5.", "+1e1"], pa.float64(), [1.5, 2.0, None, None, 0.5, 5.0, 10.0]),
        (["3", "4.0"], pa.int32(), [3, 4]),
        (np.array([2**31 - 1], np.uint64), pa.int32(), [2**31 - 1]),
        (pa.array([1.5, 1.5]).dictionary_encode(), pa.float64(), [1.5, 1.5]),
    ],
)
def test_numbers_of_any_type_are_numbers(values, type_, numbers):
    read = typed(values if isinstance(values, pa.Array) else pa.array(values), "start_s", type_)
    assert read.type == type_
    assert read.to_pylist() == numbers


@pytest.mark.parametrize(
    ("values", "name", "type_", "message"),
    [
        ([1.0, 1.5], "utt_id", pa.string(), "row 2: utt_id is 1.5; it must be text or a whole number"),
        ([2.0**54], "utt_id", pa.string(), "it must be text or a whole number"),
        (np.array([2**25], np.float32), "utt_id", pa.string(), "it must be text or a whole number"),
        ([Decimal("1.50")], "utt_id", pa.string(), "utt_id is .*; it must be text or a whole number"),
        ([True], "utt_id", pa.string(), "column utt_id is bool; it must be text or a whole number"),
        ([datetime.date(2026, 1, 1)], "utt_id", pa.string(), r"column utt_id is date32.*; it must be text"),
        ([b"a", b"\xff"], "utt_id", pa.string(), "row 2: utt_id is .*, which is not UTF-8"),
        ([True], "valence", pa.float32(), "column valence is bool; it must be a number"),
        ([datetime.timedelta(1)], "start_s", pa.float64(), "column start_s is duration.*; it must be a number"),
        ([1.0, np.inf], "end_s", pa.float64(), "row 2: end_s is Infinity; it must be a number from"),
        ([1e300], "end_s", pa.float64(), "end_s is 1e.300; it must be a number from"),
        ([-1], "channel", pa.int32(), "channel is -1; it must be a whole number from 0 to 1,023"),
        ([1024], "channel", pa.int32(), "it must be a whole number from 0 to 1,023"),
        ([2**31], "position", pa.int32(), "position is 2147483648; it must be a whole number from"),
        ([None, 0.5], "position", pa.int32(), "row 2: position is 0.5; it must be a whole number"),
        (["1", "1,5"], "valence", pa.float64(), "row 2: valence is '1,5'; it must be a number, its decimals behind a"),
        (["0x10"], "valence", pa.float64(), "it must be a number"),
        (["nan"], "valence", pa.float64(), "it must be a number"),
        (["1e300"], "valence", pa.float64(), "it must be a number from"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_row(values, name, type_, message):
    with pytest.raises(ColumnError, match=message):
        typed(pa.array(values), name, type_)


def order_of(session_ids, position, start_s, decides=None):
    columns = [pa.array(session_ids), pa.array(position, pa.int32()), pa.array(start_s, pa.float64())]
    order, found = session_order(*columns, None if decides is None else np.array(decides))
    order = np.arange(len(session_ids)) if order is None else order
    return order.tolist(), found[order].tolist()


def test_sessions_are_ordered_by_position_else_time_else_rows():
    assert order_of("baab", [None] * 4, [None] * 4) == ([0, 3, 1, 2], [0, 1, 0, 1])
    assert order_of("baab", [None] * 4, [3.0, 2.0, 1.0, 0.0]) == ([3, 0, 2, 1], [0, 1, 0, 1])
    assert order_of("baab", [5, 2, 1, 4], [None, 0.0, 1.0, 2.0]) == ([3, 0, 2, 1], [4, 5, 1, 2])
    # One session may be said by position, another by time, a third by neither.
    mixed = order_of("aabbcc", [2, 1, None, None, None, None], [None, None, 2.0, 1.0, None, None])
    assert mixed == ([1, 0, 3, 2, 4, 5], [1, 2, 0, 1, 0, 1])
    assert order_of("aaa", [1, 1, 1], [2.0, 0.0, 1.0]) == ([1, 2, 0], [1, 1, 1])
    assert order_of("", [], []) == ([], [])


def test_order_is_that_of_a_plain_sort():
    rng = np.random.default_rng(0)
    session, start_s = rng.integers(0, 20, 500), rng.permutation(500).astype(float)
    order, _ = order_of(session, [None] * 500, start_s)
    first = {name: row for row, name in reversed(list(enumerate(session)))}
    assert order == sorted(range(500), key=lambda row: (first[session[row]], start_s[row]))


@pytest.mark.parametrize(
    ("position", "start_s", "message"),
    [
        ([0, None, 1], [0.0, 1.0, 2.0], "row 2: session 'a' has no position in this row, and has one in others"),
        ([None] * 3, [0.0, 1.0, None], "row 3: session 'a' has no start_s in this row"),
    ],
)
def test_what_is_there_in_part_is_refused(position, start_s, message):
    with pytest.raises(ColumnError, match=message):
        order_of("aaa", position, start_s)


def test_rows_that_failed_may_lack_their_place_and_come_last():
    decides = [False, True, True]
    assert order_of("aaa", [None, 1, 0], [None] * 3, decides) == ([2, 1, 0], [0, 1, 2])
    assert order_of("aaa", [None] * 3, [None, 2.0, 1.0], decides)[0] == [2, 1, 0]
    assert order_of("ab", [None, 3], [None, None], [False, True]) == ([0, 1], [0, 3])
    # A session of nothing else keeps what it says.
    assert order_of("aab", [7, 5, 3], [None] * 3, [False, False, True]) == ([1, 0, 2], [5, 7, 3])


def test_columns_close_to_an_absent_one_are_named_and_others_are_not():
    wanted = {"split", "speaker_id", "start_s", "end_s", "duration_s"}
    assert near_misses(["Split ", "SpeakerID", "start", "End"], wanted) == (
        "'Split ' (is split meant?), 'SpeakerID' (is speaker_id meant?), 'start' (is start_s meant?), "
        "'End' (is end_s meant?)"
    )
    assert near_misses(["speaker", "split_set", "starts_at", "duration", "dialog_start_s", "trend"], wanted) == ""
    assert near_misses(["Split", "start"], {"end_s"}) == ""
