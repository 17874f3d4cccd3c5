"""Weight formats: what the numbers of a matrix are stored as.

Floating-point numbers, or unsigned integers u in groups of 16, 32, 64 or 128 columns of a row, which share a scale.
Symmetric formats: weight = scale * (u - zero), zero = 2^(bits - 1). Formats with minimum: weight = scale * u + minimum.
Floating-point formats multiply float32 inputs, but for bfloat16+inputs, whose inputs are rounded to bfloat16, too.
Scales and minima are float16; in *nested* formats they are int8, in units that 256 columns share, one float16 for the
scales and one for the minima.

With groups of 32, int4, int4+min, int5, int5+min and int8 hold GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 unchanged; the
nested formats, int2k+min to int6k, hold its K-quants.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """A format of weights. bits: of one value, scales not counted; has_minimum, is_nested: of integers, see above;
    rounds_inputs: of floating-point numbers."""

    name: str
    bits: int
    is_float: bool = False
    has_minimum: bool = False
    is_nested: bool = False
    rounds_inputs: bool = False


FORMATS = (
    Format("float32", 32, is_float=True),
    Format("float16", 16, is_float=True),
    Format("bfloat16", 16, is_float=True),
    Format("int8", 8),
    Format("int8+min", 8, has_minimum=True),
    Format("int4", 4),
    Format("int4+min", 4, has_minimum=True),
    Format("int5", 5),
    Format("int5+min", 5, has_minimum=True),
    Format("int2k+min", 2, has_minimum=True, is_nested=True),
    Format("int4k", 4, is_nested=True),
    Format("int4k+min", 4, has_minimum=True, is_nested=True),
    Format("int5k+min", 5, has_minimum=True, is_nested=True),
    Format("int6k", 6, is_nested=True),
    # Packed models hold numbers of formats: new ones come last.
    Format("bfloat16+inputs", 16, is_float=True, rounds_inputs=True),
)
FLOAT32, FLOAT16, BFLOAT16, INT8, INT8_MIN, INT4, INT4_MIN, INT5, INT5_MIN, *_LATER = range(len(FORMATS))
INT2K_MIN, INT4K, INT4K_MIN, INT5K_MIN, INT6K, BFLOAT16_INPUTS = _LATER
FORMAT_NAMES = tuple(fmt.name for fmt in FORMATS)

# Columns of a group of integers. PAIR instead of them marks matrices that read rounded inputs: less than any.
GROUPS, PAIR = (16, 32, 64, 128), 2
# Columns that share the units of a nested format.
SUPER = 256


def is_float(fmt: int) -> bool:
    """Whether a format holds floating-point numbers."""
    return FORMATS[fmt].is_float


def rounds_inputs(fmt: int) -> bool:
    """Whether the inputs of a format's products are rounded to bfloat16."""
    return FORMATS[fmt].rounds_inputs


def group_of(fmt: int, group: int) -> int:
    """The GROUP of a matrix: `group` for integers, else PAIR where inputs are rounded and 0 where they are float32."""
    if not is_float(fmt):
        return group
    return PAIR if rounds_inputs(fmt) else 0


def bits(fmt: int) -> int:
    """Bits of one value, scales not counted."""
    return FORMATS[fmt].bits


def high_bits(fmt: int) -> int:
    """Bits of a value that lie apart from its low 4: 1 of 5, 2 of 6."""
    return bits(fmt) - 4 if 4 < bits(fmt) < 8 else 0


def has_minimum(fmt: int) -> bool:
    """Whether a format stores a minimum for each group."""
    return FORMATS[fmt].has_minimum


def is_nested(fmt: int) -> bool:
    """Whether a format's scales and minima are integers in units of their own."""
    return FORMATS[fmt].is_nested


def zero(fmt: int) -> int:
    """The stored value that stands for weight 0 in a symmetric format; 0 in a format with minimum."""
    return 0 if has_minimum(fmt) or is_float(fmt) else 1 << bits(fmt) - 1


def integer_format(width: int, minimum: bool, nested: bool = False) -> int:
    """The smallest format of integers of at least `width` bits, with a minimum or without.

    nested: a nested one where there is one that large.
    """
    kinds = [fmt for fmt, kind in enumerate(FORMATS) if not kind.is_float and kind.has_minimum == minimum]
    large = [fmt for fmt in kinds if bits(fmt) >= width]
    return min(large, key=lambda fmt: (is_nested(fmt) != nested, bits(fmt)))


def common_format(formats: set[int]) -> int:
    """The smallest format that holds the integers of all these formats; float32 where some are floating-point.

    It is nested if all of them are and there is a nested one that large, which there is not for 6 bits and a minimum.
    """
    if len(formats) == 1:
        return next(iter(formats))
    if any(map(is_float, formats)):
        return FLOAT32
    return integer_format(max(map(bits, formats)), any(map(has_minimum, formats)), all(map(is_nested, formats)))
