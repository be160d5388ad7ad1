"""From raw numbers to transitions, and what goes with them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gateloop_jax._gate_loop import polar_gate
from gateloop_jax._primitive import accumulation


def transition_of(z: Array, gate: str) -> Array:
    """Raw transitions z, of each the numbers that its gate takes, to a (..., C).

    "polar": σ(|z|) z/|z| of (re, im) pairs, 0.5 at z = 0; "magnitude_phase": σ(m) e^{iθ} of (m, θ)
    pairs, both complex; "sigmoid": σ(z), real (arXiv 2311.01927, section 3.2).
    """
    if gate == "polar":
        return polar_gate(z)
    wide = z.astype(accumulation(z.dtype))
    if gate == "sigmoid":
        return jax.nn.sigmoid(wide)
    modulus, phase = jax.nn.sigmoid(wide[..., 0::2]), wide[..., 1::2]
    return jax.lax.complex(modulus * jnp.cos(phase), modulus * jnp.sin(phase))


def input_scale(z: Array, gate: str, normalize: bool | str) -> Array:
    """What the input is scaled by, (..., C): True 1 - |a|, "variance" √(1 - |a|²)."""
    wide = z.astype(accumulation(z.dtype))
    if gate == "polar":
        re, im = wide[..., 0::2], wide[..., 1::2]
        at_zero = (re == 0) & (im == 0)  # where the modulus has no gradient
        logit = jnp.where(at_zero, 0, jnp.hypot(jnp.where(at_zero, 1, re), im))
    else:
        logit = wide if gate == "sigmoid" else wide[..., 0::2]
    rest = jax.nn.sigmoid(-logit)  # 1 - |a|, exact where |a| is near 1
    if normalize is True:
        return rest
    # The root's gradient at zero is infinite.
    return jnp.sqrt(jnp.maximum(rest * (2 - rest), np.finfo(np.float32).tiny))
