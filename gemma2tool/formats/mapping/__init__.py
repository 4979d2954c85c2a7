"""What formats share: tables of tensors, and invertible transforms between a format's tensors and the canonical
ones.
"""
