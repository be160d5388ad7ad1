#!/usr/bin/env python3
"""Trains a GateLoop Transformer on the bytes of a file with JAX and optax, then samples from it.

    python examples/jax_train.py --data FILE --out DIR

The twin of `gateloop train`: the same model, batches, schedule and Adam. DIR gets metrics.jsonl,
one object a step with the same fields, config.json and model.safetensors. `gateloop evaluate` and
`gateloop generate` read the last two. FILE may be compressed (gzip, xz, bzip2). Ctrl-C and the
signals HUP, QUIT, TERM, USR1, USR2 and XCPU finish the step, save and exit with 128 + the signal's
number.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from byte_batches import batch_at, check_lengths, described, read, windows
from jax import Array
from stop_signals import received, record_signals

from gateloop_jax import GateLoopTransformer, load_checkpoint, save_checkpoint


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", type=Path, required=True, help="the text; any bytes")
    flag("--out", type=Path, required=True, help="the directory of the run")
    flag("--start", type=Path, help="a model's directory: train on from its weights")
    flag("--split", help="bytes to train on, validate on: N,N (default: 90 and 5 per cent)")
    flag("--dim", type=int, default=256)
    flag("--depth", type=int, default=4)
    flag("--steps", type=int, default=1000)
    flag("--batch", type=int, default=16, help="sequences a step")
    flag("--length", type=int, default=256, help="bytes a sequence")
    flag("--learning-rate", type=float, default=4e-3, help="after the warm-up; then falls to zero")
    flag("--warmup-steps", type=int, default=100)
    flag("--clip", type=float, default=1.0, help="largest gradient norm")
    flag("--validate-every", type=int, default=200)
    flag("--validation-windows", type=int, default=64)
    flag("--sample-length", type=int, default=256, help="bytes to generate at the end")
    flag("--seed", type=int, default=0)
    return parser.parse_args()


def say(line: str) -> None:
    """A reader that has gone away, or a full disk, ends no run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


# ---- Training ------------------------------------------------------------------------------------


def loss(model: GateLoopTransformer, ids: Array) -> Array:
    """Mean next-byte cross-entropy in nats of ids (B, T + 1)."""
    logits = model(ids[:, :-1])
    nats: Array = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
    return nats


def learning_rate(options: argparse.Namespace) -> Callable[[Any], Array]:
    """Linear up, then linear down to zero after the last step."""
    warmup: int = options.warmup_steps
    peak: float = options.learning_rate

    def rate(step: Any) -> Array:
        down = 1 - (step - warmup + 1) / (options.steps - warmup + 1)
        share: Array = jnp.where(step < warmup, (step + 1) / max(warmup, 1), down)
        return share * peak

    return rate


@eqx.filter_jit(donate="all")
def update(
    model: GateLoopTransformer, state: Any, ids: Array, optimizer: Any
) -> tuple[GateLoopTransformer, Any, Array, Array]:
    """-> the model, the optimiser's state, the loss, the gradient's norm before clipping."""
    nats, gradient = eqx.filter_value_and_grad(loss)(model, ids)
    steps, state = optimizer.update(gradient, state)
    return eqx.apply_updates(model, steps), state, nats, optax.tree.norm(gradient)


def validate(model: GateLoopTransformer, ids: Any) -> float:
    """Bits per byte of ids (windows, length + 1)."""
    nats = eqx.filter_jit(loss)
    # 64 windows at a time: the logits of more would fill the memory.
    parts = [jnp.asarray(ids[i : i + 64]) for i in range(0, len(ids), 64)]
    total = sum(float(nats(model, part)) * len(part) for part in parts)
    return total / len(ids) / math.log(2)


def train(options: argparse.Namespace) -> GateLoopTransformer:
    text, held_out = parts = read(options.data, options.split)
    check_lengths(parts, options.data, options.length, "bytes")
    validation = windows(held_out, options.validation_windows, options.length)
    key = jax.random.key(options.seed)
    model = (
        load_checkpoint(options.start)
        if options.start
        else GateLoopTransformer(256, options.dim, options.depth, key, architecture="pytorch")
    )
    rate = learning_rate(options)
    optimizer = optax.chain(
        optax.clip_by_global_norm(options.clip), optax.adam(rate, b1=0.9, b2=0.98, eps=1e-8)
    )
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    begin = time.perf_counter()
    metrics_file: Path = options.out / "metrics.jsonl"
    metrics_file.unlink(missing_ok=True)
    training = described(options, [len(part) for part in parts])
    save_checkpoint(options.out, model, training)  # for those who follow the run
    with metrics_file.open("w", encoding="utf-8") as log:
        for step in range(1, options.steps + 1):
            start = time.perf_counter()
            ids = batch_at(text, step - 1, range(options.batch), options.length, options.seed)
            model, state, nats, norm = update(model, state, jnp.asarray(ids), optimizer)
            bits = float(nats) / math.log(2)
            if not math.isfinite(bits):
                raise SystemExit(
                    f"the loss is not finite at step {step}: try a lower learning rate"
                )
            metrics = {
                "step": step,
                "train_bits_per_byte": bits,
                "learning_rate": float(rate(step - 1)),
                "gradient_norm": float(norm),
                "tokens_per_second": options.batch * options.length / (time.perf_counter() - start),
            }
            last = step == options.steps
            if last or step % options.validate_every == 0:
                metrics["validation_bits_per_byte"] = validate(model, validation)
                say(f"step {step}  {metrics['validation_bits_per_byte']:.4f} bits/byte")
            if last:
                # Before what takes longest.
                save_checkpoint(options.out, model, training, same_run=True)
                whole = windows(held_out, 4096, options.length)
                metrics["final_validation_bits_per_byte"] = validate(model, whole)
            metrics["elapsed_seconds"] = time.perf_counter() - begin
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            if received[0] and not last:
                save_checkpoint(options.out, model, training, same_run=True)
                sys.exit(128 + received[0])
    return model


# ---- Generation ----------------------------------------------------------------------------------


def sample(model: GateLoopTransformer, prime: bytes, length: int, key: Array) -> bytes:
    """Reads the prompt at once, then goes on byte by byte from the state, each at the same cost."""
    prompt = jnp.frombuffer(prime, jnp.uint8).astype(int)
    logits, state = model.advance(prompt, model.initial_state())
    logits = logits[-1]
    out = bytearray()
    for k in jax.random.split(key, length):
        byte = jax.random.categorical(k, logits)
        out.append(int(byte))
        logits, state = model.step(byte, state)
    return bytes(out)


def main() -> None:
    options = parse()
    record_signals()
    model = train(options)
    text = sample(model, b"The ", options.sample_length, jax.random.key(options.seed))
    say("The " + text.decode(errors="replace"))


if __name__ == "__main__":
    main()
