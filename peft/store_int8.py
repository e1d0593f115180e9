"""Row-wise int8 storage."""

from peft.store_rows import RowStore


class Int8Store(RowStore):
    """A weight as int8 with one float32 scale a row, dequantized in one pass at each product.

    The largest error of an element is half a step, max|row| / 254, in float32.
    """
