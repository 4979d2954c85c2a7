"""Budgets: the best type of each matrix for a size, or the least size for a KL, solved to a proven optimum."""
