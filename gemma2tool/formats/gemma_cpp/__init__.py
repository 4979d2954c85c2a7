"""gemma.cpp's .sbs files."""
