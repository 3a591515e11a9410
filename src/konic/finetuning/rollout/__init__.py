"""PromptBatch -> Rollout: responses by a sampler, and how policy and reference score every token of them.

In: a policy and prompts. Out: `Samples`, `Rollout`, and `Evaluation` of given prompts.
"""
