"""Rollouts: one engine interface, the in-process engine, SGLang servers, and the weight sync between them."""
