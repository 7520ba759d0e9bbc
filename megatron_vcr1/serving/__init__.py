"""`vcr1 serve`: serves one model through an OpenAI-compatible endpoint on this machine."""
