"""What a model's answers are worth: log-probs, benchmarks, metrics."""
