"""Rollouts from SGLang servers: processes, client, weight sync, and the plug-in that the servers load."""
