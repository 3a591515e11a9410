"""PromptBatch -> Rollout: responses by a sampler, and how policy and reference score every token of them.

Input: a policy and prompts. Output: `Samples`, `Rollout`, and an `Evaluation` of given prompts.
"""
