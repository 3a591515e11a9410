"""base_model -> weights -> hidden states -> distributions and values.

Input: a model name and a LoRA config. Output: `Policy` (with its reference, value head and `LanguageModel`) and token
scores.
"""
