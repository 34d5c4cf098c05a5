"""Config and plugin, without weights: also `python -m unittest`."""

import unittest

from inference_pio.models.qwen3_coder_next.plugin import PLUGIN

JSON = {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "rms_norm_eps": 1e-6, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "rope_theta": 5000000,
        "shared_expert_intermediate_size": 512, "partial_rotary_factor": 0.25, "full_attention_interval": 4, "max_position_embeddings": 262144}


class Config(unittest.TestCase):
    def test_every_fourth_layer_attends(self):
        config = PLUGIN.parse_config(JSON, "safetensors")
        self.assertEqual([i for i, recurrent in enumerate(config.recurrent) if not recurrent], list(range(3, 48, 4)))
        self.assertEqual(config.rotary_dim, 64)

    def test_the_new_spelling_means_the_same(self):
        old = ("rope_theta", "partial_rotary_factor", "full_attention_interval")
        new = {k: v for k, v in JSON.items() if k not in old}
        new |= {"layer_types": [("full" if i % 4 == 3 else "linear") + "_attention" for i in range(48)],
                "rope_parameters": {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.25}}
        self.assertEqual(PLUGIN.parse_config(new, "safetensors"), PLUGIN.parse_config(JSON, "safetensors"))

    def test_bytes_of_a_token_and_of_a_state(self):
        layout = PLUGIN.cache_layout(PLUGIN.parse_config(JSON, "safetensors"))
        self.assertEqual(2 * layout.layers * layout.g * layout.p * 2, 24_576)
        self.assertEqual(layout.states.nbytes, 36 * 4 * (32 * 128 * 128 + 3 * 8192))

    def test_what_is_not_done_is_refused(self):
        for name, value in (("decoder_sparse_step", 2), ("rope_scaling", {"type": "yarn"}), ("hidden_act", "gelu"), ("num_experts_per_tok", 513)):
            with self.assertRaisesRegex(ValueError, name):
                PLUGIN.parse_config({**JSON, name: value}, "safetensors")


class Prompts(unittest.TestCase):
    def test_a_middle_ends_where_another_file_would_begin(self):
        fim = PLUGIN.prompts.fim
        self.assertEqual((fim.prefix, fim.suffix, fim.middle), ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"))
        self.assertIn("<|file_sep|>", fim.stop)
        self.assertIn("<|im_end|>", PLUGIN.prompts.stop)


if __name__ == "__main__":
    unittest.main()
