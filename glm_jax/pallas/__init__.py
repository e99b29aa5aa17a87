"""GPU kernels in Pallas Mosaic GPU: arrays and ints in, arrays out."""
