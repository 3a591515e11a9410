"""A run's folder -> its weights at work: responses, evaluations, a chat. Nothing in it is trusted or imported."""
