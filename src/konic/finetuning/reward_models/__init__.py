"""Feedback -> a sequence classifier, and a classifier -> a reward.

In: preference pairs or labelled texts, or a trained classifier. Out: a folder that `transformers` loads, or scores.
"""
