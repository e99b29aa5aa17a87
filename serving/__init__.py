"""OpenAI endpoints before the engine: what HTTP clients force on us, and nothing else."""
