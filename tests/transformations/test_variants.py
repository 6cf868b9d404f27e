"""Each function compiled, op by op, and with its arguments on a given device (`chex.variants`)."""

import chex
import jax
from absl.testing import parameterized

from tests.transformations.cases import BY_NAME, assert_close, outputs

NAMES = (
    "lstm_step",
    "slstm_step",
    "mlstm_step",
    "layer_norm",
    "multi_head_norm",
    "soft_cap",
    "dense",
    "embed",
    "document_starts",
)


class Functions(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    @parameterized.parameters(*NAMES)
    def test_every_variant_equals_the_compiled_function(self, name):
        with jax.enable_x64(True):
            arguments = BY_NAME[name].arguments()
            actual = self.variant(BY_NAME[name].run)(arguments)
            assert_close(actual, outputs(name)(arguments), 1e-12)
