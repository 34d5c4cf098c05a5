"""The forward pass on tiny random weights: also `python -m unittest`."""

import unittest

from inference_pio.models.benchmark import Bench
from inference_pio.models.qwen3_0_6b.config import Config
from inference_pio.models.qwen3_0_6b.plugin import PLUGIN
from inference_pio.native.dtype import DType

TINY = Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=80,
              max_position_embeddings=128, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True)


class Forward(unittest.TestCase):
    def setUp(self):
        self.bench = Bench(PLUGIN, TINY, "cpu", 1, DType.F32, DType.F32, context=64)

    def tearDown(self):
        self.bench.backend.close()

    def calls(self, position):
        self.bench.place(1, position, 1, 1)
        with self.bench.backend.record() as calls:
            self.bench.forward()
        return calls

    def test_two_decode_steps_make_equal_calls(self):
        """Only device memory differs between steps, so that one recording serves them all."""
        first, second = self.calls(3), self.calls(40)
        self.assertEqual(first, second)
        self.assertGreater(len(first), 6 * TINY.num_hidden_layers)

    def test_a_step_writes_logits_for_every_wanted_row(self):
        self.bench.place(2, 5, 3, 2)
        self.bench.forward()
        logits = memoryview(self.bench.backend.copy_out(self.bench.workspace.logits)).cast("f")
        v = TINY.vocab_size
        rows = [logits[i * v:(i + 1) * v].tolist() for i in range(3)]
        self.assertTrue(any(rows[0]) and any(rows[1]))
        self.assertFalse(any(rows[2]), "rows that were not wanted stay as they were")


if __name__ == "__main__":
    unittest.main()
