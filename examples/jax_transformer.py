"""A GateLoop Transformer over bytes in JAX: ids in, logits out, and on from a state."""

import jax
import jax.numpy as jnp

from gateloop_jax import GateLoopTransformer

model = GateLoopTransformer(num_tokens=256, dim=512, depth=6, key=jax.random.key(0))

ids = jax.random.randint(jax.random.key(1), (1, 1024), 0, 256)
logits = model(ids)
print(logits.shape)  # (1, 1024, 256)

logits, state = model.advance(ids, model.initial_state(batch=1))
logits, state = model.step(jnp.argmax(logits[:, -1], -1), state)
print(logits.shape)  # (1, 256)
