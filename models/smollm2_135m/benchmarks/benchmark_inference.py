"""Speed of SmolLM2-135M with random weights of its true shapes: python benchmark_inference.py --help"""

import sys

from inference_pio.models.benchmark import main
from inference_pio.models.smollm2_135m.config import Config
from inference_pio.models.smollm2_135m.plugin import PLUGIN

CONFIG = Config(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
                vocab_size=49152, max_position_embeddings=8192, rope_theta=1e5, rms_norm_eps=1e-5, interleaved=False)

if __name__ == "__main__":
    sys.exit(main(PLUGIN, CONFIG))
