"""The heavy operations in C, for hosts without a GPU: built once by the C compiler of the machine."""
