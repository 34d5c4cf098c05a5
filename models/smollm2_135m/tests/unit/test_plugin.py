"""Config and plugin, without weights: also `python -m unittest`."""

import unittest

from inference_pio.models.smollm2_135m.plugin import PLUGIN

JSON = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8,
        "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
GGUF = {"llama.embedding_length": 576, "llama.feed_forward_length": 1536, "llama.block_count": 30, "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3, "llama.vocab_size": 49152, "llama.context_length": 8192, "llama.rope.freq_base": 1e5,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 64}


class Config(unittest.TestCase):
    def test_old_and_new_spellings_of_the_rotation(self):
        for rope in ({"rope_theta": 1e5}, {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}):
            self.assertEqual(PLUGIN.parse_config({**JSON, **rope}, "safetensors").rope_theta, 1e5)

    def test_gguf(self):
        config = PLUGIN.parse_config(GGUF, "gguf")
        self.assertEqual((config.head_dim, config.num_key_value_heads, config.interleaved), (64, 3, True))
        layout = PLUGIN.cache_layout(config)
        self.assertEqual((layout.layers, layout.g, layout.p), (30, 3, 64))

    def test_what_is_missing_is_named(self):
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"):
            with self.assertRaisesRegex(ValueError, name):
                PLUGIN.parse_config({k: v for k, v in JSON.items() if k != name}, "safetensors")
        for name in ("llama.embedding_length", "llama.context_length"):
            with self.assertRaisesRegex(ValueError, name):
                PLUGIN.parse_config({k: v for k, v in GGUF.items() if k != name}, "gguf")

    def test_what_is_not_done_is_refused(self):
        with self.assertRaisesRegex(ValueError, "llama3"):
            PLUGIN.parse_config({**JSON, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, "safetensors")
        with self.assertRaisesRegex(ValueError, "attention_bias"):
            PLUGIN.parse_config({**JSON, "attention_bias": True}, "safetensors")


if __name__ == "__main__":
    unittest.main()
