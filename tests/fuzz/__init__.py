"""Fuzzing of every reader: targets, seeds, mutations and the worker that runs them. See CAMPAIGN.md."""
