"""Formats other than that of transformers: LLaVA's original one, and adapters; each is translated here."""
