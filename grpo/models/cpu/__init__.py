"""Code that makes a CPU faster: compiled decoding, fused layers, fast matrix products."""
