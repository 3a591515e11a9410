"""DatasetConfig -> rows -> prompts -> tokens, and samples: one record for each response.

In: the name of a file or Hub dataset, or prompts in memory. Out: `Prompt`, `PromptSet`, `PromptBatch`, `Sample`.
"""
