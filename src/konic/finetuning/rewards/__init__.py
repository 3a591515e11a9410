"""Samples -> Scores: calls the user's rewards, weights their parts and reduces them to one number per response.

In: a composer and samples. Out: `Scores`, with every part and every fault. Rewards run in this process or in workers.
"""
