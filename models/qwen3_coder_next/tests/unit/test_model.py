"""The forward pass on tiny random weights: also `python -m unittest`."""

import sys
import unittest
from array import array
from pathlib import Path

from inference_pio.models.qwen3_coder_next.config import Config
from inference_pio.models.qwen3_coder_next.plugin import PLUGIN
from inference_pio.native.backend import Backend
from inference_pio.native.dtype import DType

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from random_weights import RandomExperts  # noqa: E402

sys.path.pop(0)
TINY = Config(vocab_size=80, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rotary_dim=16, rope_theta=1e6,
              rms_norm_eps=1e-6, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
              linear_conv_kernel_dim=4, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True,
              max_position_embeddings=128, tie_word_embeddings=False, recurrent=(True, True, True, False))
PAGE, PAGES, SLOTS = 16, 5, 4


class Forward(unittest.TestCase):
    def setUp(self):
        self.backend = Backend.open("cpu", 1)
        layout = PLUGIN.cache_layout(TINY)
        self.weights = PLUGIN.load(TINY, RandomExperts(self.backend, DType.F32, DType.F32), self.backend)
        _, kv = self.backend.kv_cache(layout.layers, PAGES, layout.g, PAGE, layout.p, DType.F32)
        s = layout.states
        self.slots, states = self.backend.states(s.layers, SLOTS, s.hk, s.hv, s.pk, s.pv, s.taps)
        self.cache = layout.in_order(kv, states)
        self.workspace = PLUGIN.workspace(TINY, self.backend, 8, 2, DType.F32)
        self.batch = self.backend.batch(8, 1, PAGES, 2)

    def tearDown(self):
        self.backend.close()

    def place(self, first, n, start, keep):
        """n tokens from position `first`; the state is taken from slot `start` and kept after rows as `keep` says."""
        self.batch.resize(n, 1, 1)
        outs = [keep.get(row, -1) for row in range(n)]
        for name, values in (("ids", [5 + first + t for t in range(n)]), ("positions", range(first, first + n)), ("slots", range(PAGE + first, PAGE + first + n)),
                             ("sequences", [0] * n), ("query_starts", [0, n]), ("page_table", range(1, PAGES)), ("logit_rows", [n - 1]),
                             ("states_in", [start]), ("states_out", outs)):
            self.backend.copy_in(getattr(self.batch, name), array("i", values))

    def forward(self):
        logits = PLUGIN.forward(TINY, self.weights, self.workspace, self.batch, self.cache)
        return memoryview(self.backend.copy_out(logits)).cast("f")[:TINY.vocab_size].tolist()

    def test_two_decode_steps_make_equal_calls(self):
        """Only device memory differs between steps, so that one recording serves them all."""
        recorded = []
        for first, start, keep in ((3, 1, {0: 1}), (40, 2, {0: 3})):
            self.place(first, 1, start, keep)
            with self.backend.record() as calls:
                PLUGIN.forward(TINY, self.weights, self.workspace, self.batch, self.cache)
            recorded.append(calls)
        self.assertEqual(recorded[0], recorded[1])
        self.assertGreater(len(recorded[0]), 6 * TINY.num_hidden_layers)

    def test_a_state_taken_up_in_the_middle_gives_what_one_run_gives(self):
        self.place(0, 6, -1, {5: 0})
        whole = self.forward()
        self.place(0, 6, -1, {3: 1, 5: 0})
        self.assertEqual(self.forward(), whole, "keeping a state changes nothing")
        self.place(4, 2, 1, {1: 2})
        for a, b in zip(self.forward(), whole):
            self.assertAlmostEqual(a, b, delta=1e-4)
        self.place(4, 2, 0, {1: 2})
        self.assertGreater(max(abs(a - b) for a, b in zip(self.forward(), whole)), 1e-3, "another state gives something else")


if __name__ == "__main__":
    unittest.main()
