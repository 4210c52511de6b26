"""CRC-32C, the checksum of TFRecord files, over many rows at once."""

import functools

import numpy as np

_WIDTH = 128  # bytes of the rows into which long data is cut
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reversed


def _table() -> np.ndarray:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, crc >> 1 ^ np.uint32(_POLYNOMIAL), crc >> 1)
    return crc


_TABLE = _table()


def crc_of_rows(rows: np.ndarray) -> np.ndarray:
    """Checksums uint32 [N] of the rows uint8 [N, M]."""
    return ~_advance(np.full(len(rows), 0xFFFFFFFF, np.uint32), rows)


def crc_of(data: bytes) -> int:
    """Checksum of one piece of data, about 200 MB a second where it is long.

    A checksum without its inversions is linear: the data becomes rows behind leading zeros, which count for nothing,
    and two neighbours become one by moving the first over the length of the second.
    """
    row = np.frombuffer(data, np.uint8)
    if len(row) < _WIDTH:
        return int(crc_of_rows(row[None])[0])
    doublings = (-(-len(row) // _WIDTH) - 1).bit_length()
    rows = np.zeros(_WIDTH << doublings, np.uint8)
    rows[-len(row):] = row
    rows[-len(row):][:4] ^= 255  # the inversion before the first byte
    crc = _advance(np.zeros(1 << doublings, np.uint32), rows.reshape(-1, _WIDTH))
    for doubling in range(doublings):
        crc = _apply(_over_zeros(doubling), crc[0::2]) ^ crc[1::2]
    return int(~crc[0])


def mask(crc):
    """The form in which TFRecord files store a checksum: of an int, or of an array uint32 [N]."""
    return (crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF


def _advance(crc: np.ndarray, rows: np.ndarray) -> np.ndarray:
    for column in np.ascontiguousarray(rows.T):
        crc = _TABLE[(crc ^ column) & 255] ^ crc >> 8
    return crc


def _apply(tables: np.ndarray, crc: np.ndarray) -> np.ndarray:
    """A linear map, given as what it makes of each value of each byte [4, 256], of checksums."""
    first, *others = (table[crc >> 8 * byte & 255] for byte, table in enumerate(tables))
    return functools.reduce(np.bitwise_xor, others, first)


@functools.cache
def _over_zeros(doubling: int) -> np.ndarray:
    """The map that `_WIDTH << doubling` zero bytes are."""
    if doubling:
        half = _over_zeros(doubling - 1)
        return _apply(half, half)
    values = np.arange(256, dtype=np.uint32) << np.uint32([[0], [8], [16], [24]])
    return _advance(values.ravel(), np.zeros((values.size, _WIDTH), np.uint8)).reshape(values.shape)
