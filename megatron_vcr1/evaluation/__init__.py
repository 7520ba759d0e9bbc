"""Evaluates models: predictions for benchmarks, their metrics, and log-probs of given responses.

- `evaluate`: `vcr1 evaluate CONFIG.toml`, a model on benchmarks: `predictor`, then `benchmark_result`
- `benchmark_result`: the result of a benchmark from `predictions`, by `metrics`, `summary` and `bootstrap`
- `log_probs`: `vcr1 score`
- `single_prompt`: `vcr1 generate`
"""
