"""An agent -> a run and its folder: session, state, checkpoints, metrics, self-checks, model cards.

In: an agent and what each iteration comes to. Out: files from which the run resumes bit for bit, and saved models.
"""
