"""From anywhere in the host's memory to the device's and back: every byte in its place, and the host's memory free at once."""

from __future__ import annotations

import numpy as np
import pytest

from inference_pio.native.dtype import DType


def copied(backend, pieces: list[np.ndarray], before: int, behind: int) -> tuple[bytearray, bytearray, bytearray]:
    """(bytes before, what was copied, bytes behind) of a tensor into whose middle equal pieces were copied."""
    size = len(pieces[0]) if pieces else 0
    out = backend.tensor((before + size * len(pieces) + behind,), DType.U8)
    hosts = backend.ffi.new("void *[]", [backend.ffi.from_buffer(piece) for piece in pieces])
    backend.check(backend.lib.tops_copy_in_pieces(backend.stream, backend.address(out, before, size * len(pieces)), hosts, len(pieces), size))
    for piece in pieces:
        piece[:] = 255
    data = backend.copy_out(out)
    backend.free(out)
    return data[:before], data[before:len(data) - behind], data[len(data) - behind:]


@pytest.mark.parametrize("count,size", [(0, 0), (3, 0), (1, 1), (5, 7), (1, 5_000_001), (64, 590_000), (3, 2 << 20)])
def test_pieces_follow_each_other(backend, rng, count, size):
    pieces = [rng.integers(0, 250, size, np.uint8) for _ in range(count)]
    whole = b"".join(piece.tobytes() for piece in pieces)
    assert copied(backend, pieces, before=13, behind=29) == (bytes(13), whole, bytes(29))


def test_many_copies_one_after_the_other(backend, rng):
    sizes = [int(size) for size in rng.integers(1, 900_000, 40)] + [3_000_000, 17, 1 << 20, (1 << 20) + 1]
    out, place, parts = backend.tensor((sum(sizes),), DType.U8), 0, []
    for size in sizes:
        part = rng.integers(0, 250, size, np.uint8)
        parts.append(part.tobytes())
        backend.copy_in(out, part, place)
        part[:] = 255
        place += size
    assert backend.copy_out(out) == b"".join(parts)
    backend.free(out)


def test_sizes_below_zero_are_refused(backend):
    out = backend.tensor((8,), DType.U8)
    with pytest.raises(Exception, match="count, bytes.*-1"):
        backend.check(backend.lib.tops_copy_in_pieces(backend.stream, out.pointer, backend.ffi.NULL, -1, 4))
