"""Pure functions: rows in, codes and scales out, and back."""
