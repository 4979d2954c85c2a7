"""The key-value database that Orbax keeps its arrays in."""
