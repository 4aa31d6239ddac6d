"""Serving: many requests at once over a paged cache, with prefixes kept, drafts verified, and a log to resume from."""
