"""What runs where there is a GPU (``make gpu``), and what the compiled CUDA kernels are made of."""
