"""base_model -> weights -> hidden states -> distributions and values.

In: a model's name and a LoRA config. Out: `Policy`, with its reference, value head and `LanguageModel`; token scores.
"""
