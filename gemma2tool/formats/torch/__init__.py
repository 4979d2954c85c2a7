"""Formats whose container is a file that torch.save wrote."""
