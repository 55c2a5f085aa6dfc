"""Coding against published figures, its entropy, and decoders written from the layout alone."""

import math
import struct

import numpy as np
import pytest

from laconic.ship import coding

COUNTS = np.array([45, 13, 12, 16, 9, 5])


def test_huffman_of_the_textbook_example():
    lengths = coding.code_lengths(COUNTS, 12)
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]
    assert int(COUNTS @ lengths) == 224
    assert 100 * coding.entropy(COUNTS) == pytest.approx(221.988, abs=5e-4)
    assert coding.canonical_codes(lengths).tolist() == [0b0, 0b100, 0b101, 0b110, 0b1110, 0b1111]


def test_relative_index_of_deep_compression():
    # Figure 2 of Han et al. 2016: nonzeros at 1, 4 and 15, three index bits, one filler.
    codes = coding.gaps(np.array([1, 4, 15]), 3)
    assert codes.tolist() == [2, 3, 0, 4]
    assert coding.from_gaps(codes, 3).tolist() == [1, 4, 15]


def ternary_gaussian(count, seed=0):
    weights = np.random.default_rng(seed).standard_normal(count)
    threshold = 0.7 * np.abs(weights).mean()
    return (1 + (weights > threshold) - (weights < -threshold)).astype(np.uint8)


def test_ternary_gaussian_weights():
    symbols = ternary_gaussian(10**6)
    tail = math.erfc(0.7 * math.sqrt(2 / math.pi) / math.sqrt(2)) / 2
    exact = coding.entropy(np.array([tail, 1 - 2 * tail, tail]))
    assert exact == pytest.approx(1.5595, abs=1e-4)
    coded = coding.encode(symbols, 2)
    assert 8 * coded.data.size / symbols.size <= 1.575
    assert 8 * coded.data.size / symbols.size <= 1.001 * exact
    huffman = coding.encode(symbols, 2, coders=["huffman"])
    assert 8 * huffman.data.size / symbols.size <= 1.575


def laplace_8_bits(generator, count):
    return np.clip(np.round(generator.laplace(128, 9, count)), 0, 255).astype(np.uint8)


def gaussian_5_bits(generator, count):
    return np.clip(np.round(generator.normal(16, 4, count)), 0, 31).astype(np.uint8)


DISTRIBUTIONS = {
    "mask 0.1 %": (1, lambda generator, count: generator.random(count) < 0.001),
    "mask 1 %": (1, lambda generator, count: generator.random(count) < 0.01),
    "mask 10 %": (1, lambda generator, count: generator.random(count) < 0.1),
    "mask 50 %": (1, lambda generator, count: generator.random(count) < 0.5),
    "mask 97 %": (1, lambda generator, count: generator.random(count) < 0.97),
    "ternary": (2, lambda _, count: ternary_gaussian(count)),
    "ternary, sparse": (2, lambda generator, count: generator.choice(3, count, p=[0.1, 0.8, 0.1])),
    "four values": (2, lambda generator, count: generator.choice(4, count, p=[0.4, 0.3, 0.2, 0.1])),
    "three of 256": (8, lambda generator, count: generator.choice([7, 90, 255], count)),
    "geometric": (4, lambda generator, count: np.minimum(generator.geometric(0.4, count), 15)),
    "gaussian 5 bits": (5, gaussian_5_bits),
    "laplace 8 bits": (8, laplace_8_bits),
    "uniform 3 bits": (3, lambda generator, count: generator.integers(0, 8, count)),
    "uniform 8 bits": (8, lambda generator, count: generator.integers(0, 256, count)),
}  # fmt: skip


@pytest.mark.parametrize("count", [10_000, 300_000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_size_is_within_two_per_cent_of_entropy_and_tables(name, count):
    bits, draw = DISTRIBUTIONS[name]
    symbols = np.asarray(draw(np.random.default_rng(1), count)).astype(np.uint8)
    coded = coding.encode(symbols, bits)
    tables = coding.overhead(coded.data, coded.coder, bits=bits, count=count)
    entropy = count * coding.entropy(np.bincount(symbols)) / 8
    # Four bytes: the last word of a stream, which counts where nearly all symbols agree.
    assert coded.data.size <= 1.02 * (entropy + tables) + 4
    decoded = coding.decode(coded.data, coded.coder, bits=bits, count=count)
    np.testing.assert_array_equal(decoded, symbols)


@pytest.mark.parametrize("name", ["mask 10 %", "ternary", "gaussian 5 bits", "laplace 8 bits"])
def test_lanes_cost_less_than_three_per_mille(name):
    bits, draw = DISTRIBUTIONS[name]
    symbols = np.asarray(draw(np.random.default_rng(1), 400_000)).astype(np.uint8)
    coded = coding.encode(symbols, bits, coders=["huffman"])
    tables = coding.overhead(coded.data, "huffman", bits=bits, count=symbols.size)
    code_lengths = 128 + 33
    assert tables - code_lengths < 0.003 * coded.data.size


# Decoders written from the layout in the docstring of coding.py, one symbol at a time --


def read_alphabet(data, bits):
    size = max(1, 2**bits // 8)
    values = [value for value in range(2**bits) if data[value // 8] >> value % 8 & 1]
    return values, data[size], data[size + 1 :]


def spread(blocks, values, group, count):
    base = len(values)
    return [values[blocks[i // group] // base ** (i % group) % base] for i in range(count)]


def huffman_slowly(data, bits, count):
    values, group, rest = read_alphabet(data, bits)
    alphabet = len(values) ** group
    lengths = [rest[block // 2] >> 4 * (block % 2) & 15 for block in range(alphabet)]
    rest = rest[(alphabet + 1) // 2 :]
    (lanes,) = struct.unpack_from("<I", rest)
    lane_bits = struct.unpack_from(f"<{lanes}H", rest, 4)
    text = "".join(f"{byte:08b}" for byte in rest[4 + 2 * lanes :])
    code, book = 0, {}
    for length in range(1, 16):
        code <<= 1
        for block in range(alphabet):
            if lengths[block] == length:
                book[f"{code:0{length}b}"] = block
                code += 1
    blocks = [0] * -(-count // group)
    for lane, length in enumerate(lane_bits):
        place, word = lane, ""
        for bit in text[:length]:
            word += bit
            if word in book:
                blocks[place] = book[word]
                place, word = place + lanes, ""
        text = text[length:]
    return spread(blocks, values, group, count)


def weight(code, mantissa):
    steps = 2**mantissa
    return code if code < steps else (steps + code % steps) << (code // steps - 1)


def summing_to(total, weights):
    parts = [weight * total // sum(weights) for weight in weights]
    parts[weights.index(max(weights))] += total - sum(parts)
    return parts


def rans_slowly(data, bits, count):
    values, group, rest = read_alphabet(data, bits)
    alphabet = len(values) ** group
    if rest[0] == 0:
        codes = struct.unpack_from(f"<{len(values)}H", rest, 1)
        rest = rest[1 + 2 * len(values) :]
        of_value = summing_to(2**24, [weight(code, 11) for code in codes])
        weights = of_value
        for _ in range(group - 1):
            weights = [high * low // 2**24 for high in weights for low in of_value]
    else:
        weights = [weight(code, 3) for code in rest[1 : 1 + alphabet]]
        rest = rest[1 + alphabet :]
    frequencies = [share + 1 for share in summing_to(2**24 - alphabet, weights)]
    starts = np.cumsum([0, *frequencies])
    rest = rest + bytes(-len(rest) % 4)
    words = list(struct.unpack(f"<{len(rest) // 4}I", rest))
    state, blocks = 0, []
    for _ in range(-(-count // group)):
        while state < 2**32 and words:
            state = state << 32 | words.pop()
        low = state % 2**24
        block = int(np.searchsorted(starts, low, side="right")) - 1
        blocks.append(block)
        state = (state >> 24) * frequencies[block] + low - int(starts[block])
    return spread(blocks, values, group, count)


@pytest.mark.parametrize("slowly", [huffman_slowly, rans_slowly])
@pytest.mark.parametrize("name", ["mask 10 %", "ternary", "geometric", "laplace 8 bits"])
def test_streams_follow_their_layout(name, slowly):
    bits, draw = DISTRIBUTIONS[name]
    symbols = np.asarray(draw(np.random.default_rng(2), 20_003)).astype(np.uint8)
    coder = slowly.__name__.removesuffix("_slowly")
    data = coding.encode(symbols, bits, coders=[coder]).data
    assert slowly(data.tobytes(), bits, symbols.size) == symbols.tolist()


def test_streams_of_structured_masks_follow_their_layout():
    mask = np.tile(np.array([1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0], dtype=np.uint8), 2000)
    for slowly in (huffman_slowly, rans_slowly):
        data = coding.encode(mask, 1, coders=[slowly.__name__.removesuffix("_slowly")]).data
        assert slowly(data.tobytes(), 1, mask.size) == mask.tolist()


TEXT = np.frombuffer(b"the same in fewer bits", dtype=np.uint8) % 4
MASK = (np.arange(60) % 7 == 3).astype(np.uint8)
FROZEN = [
    (TEXT, 2, "packed", "10572476620c"),
    (TEXT, 2, "huffman", "0f011233010000002b00a5c4d676b2e0"),
    (TEXT, 2, "rans", "0f0101070804031d0f358cdfe40153"),
    (MASK, 1, "packed", "0804028140201008"),
    (MASK, 1, "gaps-packed", "030900000000000000fcffff07"),
    (MASK, 1, "huffman", "030111010000003c001020408102040810"),
    (MASK, 1, "gaps-huffman", "0309000000000000009001110100000009007f80"),
    (MASK, 1, "rans", "0301011d09269e77e7998a6102"),
    (MASK, 1, "gaps-rans", "030900000000000000900101010800000008"),
]


@pytest.mark.parametrize(("symbols", "bits", "coder", "stream"), FROZEN)
def test_streams_written_once_are_read_for_ever(symbols, bits, coder, stream):
    data = np.frombuffer(bytes.fromhex(stream), dtype=np.uint8)
    decoded = coding.decode(data, coder, bits=bits, count=symbols.size)
    np.testing.assert_array_equal(decoded, symbols)
    assert coding.encode(symbols, bits, coders=[coder]).data.tobytes() == data.tobytes()
