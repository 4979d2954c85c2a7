"""Releases: a model's files as publishers name them, with receipts, checksums and a card; and their upload to a hub."""
