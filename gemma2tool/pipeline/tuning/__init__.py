"""Norm tuning: the norms of a quantized model, adjusted by gradients to keep its predictions near the source's."""
