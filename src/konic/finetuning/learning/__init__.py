"""Rollout + Scores -> an optimizer step: advantages, losses, the update, and its schedules.

Input: a rollout and its scores. Output: `Advantages`, `UpdateStats`, and an updated policy.
"""
