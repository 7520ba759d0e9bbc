"""Responses from the policy: the embedded engine and SGLang servers behind one interface, and weight sync."""
