"""Machine and job -> findings: what would keep a training from going well, each with what to do, before it starts."""
