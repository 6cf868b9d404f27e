"""Block kinds that xLSTM is compared with: their options, layers, blocks and costs."""
