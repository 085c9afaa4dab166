"""What is written for the sake of a CPU: compiled decoding, fused layers, fast products."""
