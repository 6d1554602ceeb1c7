"""Adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors."""
