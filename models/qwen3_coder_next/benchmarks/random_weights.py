"""Random weights for a mixture of experts: every stack is one random matrix, copied on the device into memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

from inference_pio.models.benchmark import RandomSource
from inference_pio.models.contract import Rows
from inference_pio.native.backend import Tensor, Weight
from inference_pio.native.dtype import DType


class RandomExperts(RandomSource):
    """What published quantised checkpoints keep in bf16 (the router, the gates of the recurrent layers) is bf16."""

    def has(self, name: str) -> bool:
        return False

    def weight(self, *names: str | Rows, rows: int | None = None, cols: int) -> Weight:
        first = names[0].name if isinstance(names[0], Rows) else names[0]
        if "mlp.gate." in first:     # the router, and the shared expert's gate
            return self._kept([rows - 1, 1], cols)
        gates = sum(map(len, names[-1].ranges)) if isinstance(names[-1], Rows) and "in_proj_ba" in names[-1].name else 0
        parts = [self._matrix(rows - gates, cols)]
        if gates:
            parts.append(self._as(DType.BF16, gates, cols))
        return self._packed(parts)

    def _kept(self, rows: Sequence[int], cols: int) -> Weight:
        return self._packed([self._as(DType.BF16, count, cols) for count in rows])

    def _as(self, dtype: DType, rows: int, cols: int) -> tuple:
        own, self._dtype = self._dtype, dtype
        part, self._dtype = self._matrix(rows, cols), own
        return part

    def experts(self, *stacks: Sequence[str] | str | Rows, e: int, rows: int, cols: int) -> Weight:
        backend = self._backend
        one = backend.pack_experts([[self._matrix(rows, cols)] for _ in stacks], self._activations)
        keep: list[Tensor] = []
        for entry, dtype in zip(one.struct, one.dtypes, strict=True):
            entry.data = self._repeat(entry.data, backend.lib.tops_packed_expert_bytes(dtype, rows, cols), e, keep)
            if entry.scales:
                entry.scales = backend.ffi.cast("float *", self._repeat(entry.scales, -(-rows // 128) * -(-cols // 128) * 4, e, keep))
            entry.rows = rows * e
        self.nbytes += one.nbytes * e
        return Weight(one.struct, tuple(rows * e for _ in stacks), cols, one.nbytes * e, one.dtypes, (*one.keep, *keep))

    def _repeat(self, pointer, nbytes: int, times: int, keep: list[Tensor]):
        """Memory with `times` copies of nbytes."""
        backend = self._backend
        source = Tensor(backend, backend.ffi.cast("void *", pointer), (nbytes,), DType.U8)
        keep.append(whole := backend.tensor((nbytes * times,), DType.U8))
        backend.copy_2d(whole, 0, nbytes, source, 0, 0, nbytes, times)
        return whole.pointer
