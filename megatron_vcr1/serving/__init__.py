"""`vcr1 serve`: a model behind an OpenAI-compatible endpoint, on this machine alone."""
