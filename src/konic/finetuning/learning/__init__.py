"""Rollout + Scores -> an optimizer step: advantages, losses, the update, and its schedules.

In: a rollout and its scores. Out: `Advantages`, `UpdateStats`, and a policy that has moved.
"""
