"""Config and plugin, without weights: also `python -m unittest`."""

import unittest

from inference_pio.models.qwen3_0_6b.plugin import PLUGIN

JSON = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True}


class Config(unittest.TestCase):
    def test_the_width_of_heads_is_a_field_of_its_own(self):
        self.assertEqual(PLUGIN.parse_config(JSON, "safetensors").head_dim, 128)
        with self.assertRaisesRegex(ValueError, "head_dim"):
            PLUGIN.parse_config({k: v for k, v in JSON.items() if k != "head_dim"}, "safetensors")

    def test_layout_and_ties(self):
        config = PLUGIN.parse_config(JSON, "safetensors")
        self.assertTrue(config.tie_word_embeddings)
        layout = PLUGIN.cache_layout(config)
        self.assertEqual((layout.layers, layout.g, layout.p), (28, 8, 128))

    def test_what_is_not_done_is_refused(self):
        with self.assertRaisesRegex(ValueError, "use_sliding_window"):
            PLUGIN.parse_config({**JSON, "use_sliding_window": True}, "safetensors")


if __name__ == "__main__":
    unittest.main()
