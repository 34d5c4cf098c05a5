"""Qwen3-4B-Instruct-2507: the architecture of Qwen3-0.6B in another size, which is why that folder's model is used as it is."""

from inference_pio.models.contract import ModelPlugin, Prompts
from inference_pio.models.qwen3_0_6b import config, model

PLUGIN = ModelPlugin(
    name="qwen3-4b-instruct-2507",
    architectures=("Qwen3ForCausalLM", "qwen3"),
    description="4B parameters, bf16, 8 GB: chat and completions on a GPU; never thinks aloud",
    checkpoint="Qwen/Qwen3-4B-Instruct-2507",
    prompts=Prompts(stop=("<|im_end|>", "<|endoftext|>")),
    parse_config=config.parse_config,
    cache_layout=model.cache_layout,
    load=model.load,
    workspace=model.workspace,
    forward=model.forward,
)
