"""Qwen3-0.6B: small, multilingual, thinks only when asked to. Not trained to fill in the middle: it continues the prefix."""

from inference_pio.models.contract import ModelPlugin, Prompts
from inference_pio.models.qwen3_0_6b import config, model

PLUGIN = ModelPlugin(
    name="qwen3-0.6b",
    architectures=("Qwen3ForCausalLM", "qwen3"),
    description="0.6B parameters, bf16, 1.2 GB: better completions and short chats on a laptop or any GPU",
    checkpoint="Qwen/Qwen3-0.6B",
    prompts=Prompts(stop=("<|im_end|>", "<|endoftext|>"), template_variables={"enable_thinking": False}),
    parse_config=config.parse_config,
    cache_layout=model.cache_layout,
    load=model.load,
    workspace=model.workspace,
    forward=model.forward,
)
