"""The key-value database in which Orbax stores arrays."""
