"""Evaluates models: predictions for benchmarks, their metrics, and log-probs of given responses.

- `evaluate`: evaluates a model on benchmarks (`vcr1 evaluate CONFIG.toml`) with `predictor` and `benchmark_result`
- `benchmark_result`: scores `predictions` for a benchmark, with `metrics`, `summary` and `bootstrap`
- `log_probs`: computes the log-probs of given responses (`vcr1 score`)
- `single_prompt`: generates one response (`vcr1 generate`)
"""
