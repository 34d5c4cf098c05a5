"""Qwen3-Coder-Next as the engine sees it."""

from __future__ import annotations

from inference_pio.models.contract import FimFormat, ModelPlugin, Prompts
from inference_pio.models.qwen3_coder_next.checkpoint import load
from inference_pio.models.qwen3_coder_next.config import parse_config
from inference_pio.models.qwen3_coder_next.model import cache_layout, forward, workspace

_CHAT = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

PLUGIN = ModelPlugin(
    name="qwen3-coder-next",
    architectures=("Qwen3NextForCausalLM", "qwen3next"),
    description="the flagship: 80 billion parameters of which 3 are active, trained to fill in the middle; for a GPU or 64 GB of memory",
    checkpoint="Qwen/Qwen3-Coder-Next",
    prompts=Prompts(
        stop=("<|im_end|>", "<|endoftext|>"),
        fim=FimFormat(
            prefix="<|fim_prefix|>", suffix="<|fim_suffix|>", middle="<|fim_middle|>",
            repository="<|repo_name|>", file="<|file_sep|>",
            stop=("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")),
        chat_template=_CHAT),
    parse_config=parse_config,
    cache_layout=cache_layout,
    load=load,
    workspace=workspace,
    forward=forward,
    # Routers and decay gates: small, and what they say is not averaged away.
    exact=("*.mlp.gate.weight", "*.shared_expert_gate.weight", "*.in_proj_ba.weight", "*.in_proj_b.weight", "*.in_proj_a.weight",
           "*.ffn_gate_inp*", "*.ssm_ba.weight"),
    experts=("*.mlp.experts.*", "*.ffn_*_exps.weight"),
)
