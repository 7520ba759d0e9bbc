"""The demo: synthetic videos, a tiny model, SFT and GRPO, evaluation, export and a report; run by tools/demo.sh."""
