"""Tokens on disk: shards of flat tokens, the ends of their documents, and a manifest."""
