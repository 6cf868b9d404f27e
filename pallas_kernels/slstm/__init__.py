"""sLSTM kernels: a scan over time with its gradient, and a decoding step."""
