"""mLSTM kernels: chunkwise over a sequence, and one decoding step."""
