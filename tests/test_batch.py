"""The input of a step: what goes in comes out, part by part."""

import numpy as np
import pytest

from minilora.batch import Chunk, Draw, Packer, Use
from minilora.params import SamplingParams
from minilora_kernels.batch import (
    INTS,
    NO_NUMBER,
    NO_ROWS,
    NOT_CHOSEN,
    ROWS_INTS,
    StepInput,
    StepRows,
    all_ended,
    pack,
    rounds_of,
    token_at,
    unpack,
)
from minilora_kernels.jit import kernel, program

# Columns of each part: 1 is no table.
OF_ROWS, OF_INPUT = StepRows(1, 1, 1, 4, 4, 4, 1), StepInput(1, 1, 4, 1, 1, 3)


@kernel
def _copy_part(part, to, at):
    """A part from to[at] on; returns where it ends."""
    for value in part:
        to[at] = value
        at += 1
    return at


@kernel
def _copy_table(table, to, at):
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            to[at] = table[row, column]
            at += 1
    return at


@kernel
def _copy_rows(rows, ints, floats, i, f):
    for part in (rows.tokens, rows.positions, rows.pages_at):
        i = _copy_part(part, ints, i)
    for table in (rows.tiles, rows.long, rows.segments):
        i = _copy_table(table, ints, i)
    return i, _copy_part(rows.scales, floats, f)


@kernel
def _copy(packed, ints, floats, counts):
    """All parts behind each other; counts: numbers of both kinds, then rows of some tables."""
    batch, rows, wanted = unpack(packed)
    i, f = _copy_rows(rows, ints, floats, 0, 0)
    i, f = _copy_rows(wanted, ints, floats, i, f)
    i = _copy_part(batch.out_rows, ints, _copy_part(batch.pages, ints, i))
    i = _copy_part(batch.chosen, ints, _copy_part(batch.ends, ints, _copy_table(batch.choices, ints, i)))
    counts[0], counts[1] = i, _copy_table(batch.cuts, floats, f)
    counts[2], counts[3], counts[4] = len(rows.tiles), len(wanted.long), len(batch.choices)


COPY = program(_copy)


def parts_of(packed):
    """All rows, the wanted ones and the other parts, read in Python."""
    ints, reals = packed.ints.tolist()[: INTS + 1], packed.ints.tolist()[INTS + 1 :]

    def part(array, places, i, width):
        return array[places[i] : places[i + 1]].reshape(-1, *([width] if width > 1 else []))

    def parts(kind, widths, first, scales):
        found = [part(packed.ints, ints, first + i, width) for i, width in enumerate(widths[:-1])]
        return kind(*found, part(packed.floats, reals, scales, widths[-1]))

    two = [parts(StepRows, OF_ROWS, i * ROWS_INTS, i) for i in range(2)]
    return *two, parts(StepInput, OF_INPUT, 2 * ROWS_INTS, 2)


def lists(parts):
    """The same with lists for arrays."""
    return type(parts)(*(part.tolist() for part in parts))


def flat(parts):
    """All parts as flat lists."""
    return [np.ravel(part).tolist() for part in parts]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_what_is_packed_comes_out(rows):
    random = np.random.default_rng(rows)

    def parts(kind, widths):
        ints = [random.integers(-(1 << 62), 1 << 62, rows * width).tolist() for width in widths[:-1]]
        return kind(*ints, random.standard_normal(rows * widths[-1]).astype(np.float32).tolist())

    every, wanted = parts(StepRows, OF_ROWS), parts(StepRows, OF_ROWS)
    batch = parts(StepInput, OF_INPUT)._replace(out_rows=[7] * (rows + 1), choices=[5] * 8, chosen=[6] * 3)
    packed = pack(every, wanted, **batch._asdict())
    assert [flat(found) for found in parts_of(packed)] == [[*one] for one in (every, wanted, batch)]
    assert packed.chosen == batch.chosen
    counts, numbers, reals = np.zeros(5, np.int64), np.zeros(200, np.int64), np.zeros(50, np.float32)
    COPY(packed, numbers, reals, counts)
    three = every, wanted, batch
    assert numbers[: counts[0]].tolist() == [value for one in three for part in one[:-1] for value in part]
    assert reals[: counts[1]].tolist() == [value for one in three for value in one[-1]]
    assert counts[2:].tolist() == [rows, rows, 2]


def test_where_all_rows_are_wanted_they_are_those_of_all():
    rows = StepRows([1, 2], [3, 4], [0, 1], [5] * 4, [6] * 8, [7] * 4, [0.5])
    counts, numbers, reals = np.zeros(5, np.int64), np.zeros(200, np.int64), np.zeros(50, np.float32)
    COPY(pack(rows, out_rows=[0, 1]), numbers, reals, counts)
    flat_rows = [value for part in rows[:-1] for value in part]
    assert numbers[: counts[0]].tolist() == [*flat_rows, *flat_rows, 0, 1] and reals[: counts[1]].tolist() == [0.5] * 2


def test_unknown_parts_are_refused():
    with pytest.raises(TypeError, match="token_s"):
        pack(token_s=[1])


def test_a_step_of_a_prompt_and_two_decodes():
    packer = Packer(group=3, kv_heads=3, part=10, most_parts=0, workers=8)
    packer.ranks = 96
    uses = (Use(5, 0.5), Use(6, 2.0))
    chunks = [
        Chunk([*range(100, 120)], 2, 13, [7, 8], (), 14),
        Chunk([*range(300, 340)], 39, 1, [1, 2, 3], uses, 39),
        Chunk([*range(50, 60)], 9, 1, [4], uses, 10),
    ]
    params = SamplingParams(temperature=0.5, top_k=40, top_p=0.75, min_p=0.25)
    draws = [Draw(0, SamplingParams(temperature=0), 9, 15, [], [], ()), Draw(1, params, -3, 40, [], [], ())]
    rows, wanted, parts = map(lists, parts_of(packer.pack(chunks, draws)))
    assert rows.tokens == [*range(102, 115), 339, 59] and rows.positions == [*range(2, 15), 39, 9]
    assert rows.pages_at == [0] * 13 + [2, 5] and parts.pages == [7, 8, 1, 2, 3, 4]
    assert rows.tiles == [[13, 1, 39, 2], [8, 5, 10, 0], [14, 1, 9, 5], [0, 8, 2, 0]], "the longest first"
    assert rows.segments == [[13, 15, 5, 0], [13, 15, 6, 96]] and rows.scales == [0.5, 2.0]
    assert parts.out_rows == [12, 13]
    assert wanted == StepRows(
        tokens=[114, 339],
        positions=[14, 39],
        pages_at=[0, 2],
        tiles=[[1, 1, 39, 2], [0, 1, 14, 0]],
        long=[],
        segments=[[1, 2, 5, 0], [1, 2, 6, 96]],
        scales=[0.5, 2.0],
    )
    assert parts.choices == [[0, 0, 9, 15], [1, 40, -3, 40]] and parts.chosen == [NOT_CHOSEN] * 2
    assert parts.cuts == [[0.0, 1.0, 0.0], [0.5, 0.75, 0.25]]


def test_of_a_step_whose_logits_are_all_wanted_nothing_is_said_twice():
    packer = Packer(group=3, kv_heads=3, part=10, most_parts=0, workers=8)
    chunks = [Chunk([*range(20)], 10, 3, [7], (), 0), Chunk([*range(9)], 8, 1, [4], (Use(5, 0.5),), 8)]
    rows, wanted, parts = map(lists, parts_of(packer.pack(chunks, [])))
    assert parts.out_rows == [0, 1, 2, 3] and len(rows.tokens) == 4 and not any(wanted)


def test_the_last_row_of_a_long_prompt_is_shared_by_all_threads():
    """It is the only row that the last layer's attention has, though there are two chunks."""
    packer = Packer(group=3, kv_heads=1, part=10, most_parts=40, workers=2)
    chunks = [Chunk([0] * 613, 600, 13, [1], (), 612), Chunk([0] * 900, 300, 8, [2], (), 900)]
    rows, wanted, parts = map(lists, parts_of(packer.pack(chunks, [])))
    assert parts.out_rows == [12] and wanted.long == [[0, 612, 0, 0]] and wanted.tiles == []
    assert len(rows.tiles) == 3 and rows.long == []


def test_neighbours_with_equal_adapters_are_one_run():
    packer = Packer(group=3, kv_heads=3, part=10, most_parts=0, workers=1)
    packer.ranks = 96
    one, half, other = Use(1, 1.0), Use(1, 0.5), Use(2, 1.0)
    chunks = [Chunk([7], 0, 1, [0], uses, 0) for uses in ((one,), (one, other), (one, other), (), (half,))]
    rows, _, _ = map(lists, parts_of(packer.pack(chunks, [])))
    assert rows.segments == [[0, 1, 1, 0], [1, 3, 1, 0], [1, 3, 2, 96], [4, 5, 1, 0]]
    assert rows.scales == [1.0, 1.0, 1.0, 0.5]


def test_long_texts_are_shared_as_far_as_there_is_room_for_parts():
    packer = Packer(group=3, kv_heads=1, part=10, most_parts=50, workers=8)
    chunks = [Chunk([0] * 613, 612, 1, [i], (), 612) for i in range(2)]
    rows, _, _ = map(lists, parts_of(packer.pack(chunks, [])))
    assert rows.long == [[0, 612, 0, 0]] and rows.tiles == [[1, 1, 612, 1]], "three parts of ten numbers for each"


@kernel
def _follow(packed, turn, tokens):
    """The tokens of a round's rows; then whether all texts end in it, and the number of rounds."""
    batch, rows, _ = unpack(packed)
    for row in range(len(rows.tokens)):
        tokens[row] = token_at(batch, rows, turn, row)
    tokens[-2], tokens[-1] = all_ended(batch, turn), rounds_of(batch)


FOLLOW = program(_follow)


@pytest.mark.parametrize(
    "turn, expected", [(0, [11, 12, 13, 0, 4]), (1, [21, 22, 23, 0, 4]), (2, [31, 0, 9, 1, 4]), (3, [8, 9, 0, 0, 4])]
)
def test_each_round_goes_on_with_the_tokens_of_the_one_before(turn, expected):
    rounds = [[21, 22, 23], [31, NO_NUMBER, 9], [8, 9, NO_NUMBER], [NOT_CHOSEN] * 3]
    choices, tokens = [0] * 12, np.zeros(5, np.int64)
    rows, chosen = NO_ROWS._replace(tokens=[11, 12, 13]), [token for one in rounds for token in one]
    packed = pack(rows, choices=choices, ends=[9, 8], chosen=chosen)
    FOLLOW(packed, turn, tokens)
    assert tokens[[0, 1, 2, 4]].tolist() == [*expected[:3], 4]
    assert turn == 3 or tokens[3] == expected[3]


def test_room_for_a_long_text_in_every_round():
    """A token at position 250, with 20 to follow: its positions are shared out from the start, in up to two splits."""
    packer = Packer(group=3, kv_heads=1, part=10, most_parts=40, workers=8)
    chunk, draw = Chunk([0] * 251, 250, 1, [1], (), 250), Draw(0, SamplingParams(), 1, 250, [], [], ())
    for rounds, long in ((1, []), (20, [[0, 250, 0, 0]])):
        rows, _, parts = map(lists, parts_of(packer.pack([chunk], [draw], rounds, {7})))
        assert rows.long == long and len(rows.tiles) == 1 - len(long)
        assert len(parts.chosen) == rounds and parts.ends == [7]
