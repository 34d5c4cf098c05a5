"""Qwen3-Coder-Next (Qwen3NextForCausalLM)."""
