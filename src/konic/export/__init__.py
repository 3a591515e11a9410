"""A run's folder -> a folder for other tools: an adapter, a full model, a GGUF file; and that folder -> the Hub."""
