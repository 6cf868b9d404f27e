"""The sLSTM on TPU: a fused scan over time with its gradient, and one step of decoding.

`vjp.slstm` is the differentiable function, `decode.slstm_decode` the step; both take plain arrays.
Source: Beck et al. 2024, arXiv:2405.04517, section 2.2; keeping the recurrent weights on the chip
for the whole sequence is the idea of Pöppel et al. 2024, arXiv:2412.07752.
"""
