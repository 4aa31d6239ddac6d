"""Conversations generated for a small model to learn from, each a function of (side, index)."""
