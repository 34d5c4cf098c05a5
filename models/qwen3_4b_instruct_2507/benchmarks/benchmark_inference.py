"""Speed of Qwen3-4B-Instruct-2507 with random weights of its true shapes: python benchmark_inference.py --help"""

import sys

from inference_pio.models.benchmark import main
from inference_pio.models.qwen3_0_6b.config import Config
from inference_pio.models.qwen3_4b_instruct_2507.plugin import PLUGIN

CONFIG = Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                vocab_size=151936, max_position_embeddings=262144, rope_theta=5e6, rms_norm_eps=1e-6, tie_word_embeddings=True)

if __name__ == "__main__":
    sys.exit(main(PLUGIN, CONFIG))
