"""One module a kernel: check it on this GPU, time it, compare with the measured ceilings."""
