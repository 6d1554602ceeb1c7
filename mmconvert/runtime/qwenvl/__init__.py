"""Qwen-VL in torch: its model, tokenizer, prompts and training, without the hub's remote code."""
