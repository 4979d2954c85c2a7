"""Quality at a size: files of several types, or files that exist, beside their source on several texts."""
