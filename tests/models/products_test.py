"""Matrix products of the decoder and their gradients, compared with float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.models import decoder


class ProductsTest(parameterized.TestCase):
  def operands(self, dtype, transposed: bool):
    rng = np.random.default_rng(0)
    x, matrix, weights = (
      rng.normal(size=shape).astype(np.float32) for shape in ((12, 16), (16, 24), (12, 24))
    )
    matrix = matrix.T if transposed else matrix
    return jnp.asarray(x, dtype), jnp.asarray(matrix, dtype), jnp.asarray(weights, dtype)

  @parameterized.product(transposed=(False, True), dtype=("float32", "bfloat16"))
  def test_values_and_gradients(self, transposed, dtype):
    # Fails if a product or a gradient contracts other axes, has another dtype, or is less precise
    # than its operands.
    x, matrix, weights = self.operands(dtype, transposed)
    product = decoder._logits if transposed else decoder._matmul

    def weighted(x, matrix):
      return jnp.sum(product(x, matrix).astype(jnp.float32) * weights.astype(jnp.float32))

    grad_x, grad_matrix = jax.jit(jax.grad(weighted, argnums=(0, 1)))(x, matrix)
    self.assertEqual((grad_x.dtype, grad_matrix.dtype), (x.dtype, matrix.dtype))
    self.assertEqual(product(x, matrix).dtype, jnp.float32 if transposed else x.dtype)
    x64, matrix64, weights64 = (np.asarray(array, np.float64) for array in (x, matrix, weights))
    kernel64 = matrix64.T if transposed else matrix64
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == "bfloat16" else dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
      np.asarray(product(x, matrix), np.float64), x64 @ kernel64, **tolerance
    )
    np.testing.assert_allclose(np.asarray(grad_x, np.float64), weights64 @ kernel64.T, **tolerance)
    expected = x64.T @ weights64
    np.testing.assert_allclose(
      np.asarray(grad_matrix, np.float64), expected.T if transposed else expected, **tolerance
    )


if __name__ == "__main__":
  absltest.main()
