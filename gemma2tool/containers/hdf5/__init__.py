"""HDF5 files of plain arrays, read without libhdf5."""
