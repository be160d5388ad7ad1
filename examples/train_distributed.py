#!/usr/bin/env python3
"""Trains a GateLoop Transformer on the text of a file with PyTorch, in any number of processes.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --data FILE --out DIR

The twin of `gateloop train`: the same batches, schedule and Adam, and what N processes compute on
their rows is what one computes on all. DIR gets metrics.jsonl, one object a step with the same
fields, config.json and model.safetensors. gateloop_cpp.checkpoint reads the last two, and so does
`gateloop generate` where the model is one of bytes. From training_state.pt --resume goes on in any
number of processes. FILE may be compressed (gzip, xz, bzip2). Ctrl-C and the signals HUP, QUIT,
TERM, USR1, USR2 and XCPU finish the step, save and exit with 128 + the signal's number.

The model reads bytes. With --tokenizer it reads the tokens of a tokenizer.json of Hugging Face's
library (`pip install tokenizers`). That file is then kept in DIR: docs/data.md says how to draw
from such a model. Losses stay in bits per byte of the text.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from byte_batches import (
    Tokens,
    batch_at,
    check_lengths,
    described,
    open_tokenizer,
    read,
    tokenized,
    windows,
)
from stop_signals import received, record_signals
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from gateloop_cpp import Transformer, checkpoint, fuse

TOKENIZER = "tokenizer.json"  # in the directory of a run that reads tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", type=Path, required=True, help="the text; any bytes")
    flag("--out", type=Path, required=True, help="the directory of the run")
    flag("--tokenizer", type=Path, help="a tokenizer.json; default: bytes, or as the run began")
    flag("--resume", action="store_true", help="go on where DIR holds a checkpoint")
    flag("--shard", action="store_true", help="FSDP2 instead of DDP: a shard of the model each")
    flag("--split", help="bytes to train on, validate on: N,N (default: 90 and 5 per cent)")
    flag("--dim", type=int, default=256)
    flag("--depth", type=int, default=4)
    flag("--tie-embeddings", action="store_true")
    flag("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    flag("--steps", type=int, default=1000)
    flag("--batch", type=int, default=16, help="sequences a step, of all processes together")
    flag("--length", type=int, default=256, help="bytes, or tokens, a sequence")
    flag("--learning-rate", type=float, default=4e-3, help="after the warm-up; then falls to zero")
    flag("--warmup-steps", type=int, default=100)
    flag("--clip", type=float, default=1.0, help="largest gradient norm")
    flag("--validate-every", type=int, default=200)
    flag("--validation-windows", type=int, default=64)
    flag("--checkpoint-every", type=int, default=500)
    flag("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.batch % dist.get_world_size():
        parser.error(f"--batch must be a multiple of the {dist.get_world_size()} processes")
    return options


# ---- Processes -----------------------------------------------------------------------------------


def join() -> torch.device:
    """The processes of torchrun, or this one alone; the device of this one."""
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    for variable, alone in dict(
        RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0"
    ).items():
        os.environ.setdefault(variable, alone)
    dist.init_process_group(backend)
    return device


def total(device: torch.device, *values: float) -> list[float]:
    """Each summed over the processes."""
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return numbers.tolist()


def say(line: str) -> None:
    """Of the first process; a reader that has gone away, or a full disk, ends no run."""
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError):
            print(line, flush=True)


# ---- Model ---------------------------------------------------------------------------------------


def wrap(model: Transformer, options: argparse.Namespace) -> Any:
    """What is called for the logits: gradients are then the mean over the processes."""
    if not options.shard:
        return DistributedDataParallel(model)
    # The inputs are ids, and states stay float32.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if options.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    layers: Any = model.layers
    for mixer, feed_forward in layers:
        fully_shard(mixer, mp_policy=policy)
        fully_shard(feed_forward, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def same(a: Any, b: Any) -> bool:
    """Whether two tokenizers have the same vocabulary, merges and other parts."""
    return bool(json.loads(a.to_str()) == json.loads(b.to_str()))


def choose_tokenizer(options: argparse.Namespace, state: dict[str, Any] | None) -> Any:
    """That of the run that goes on from this state, or of --tokenizer; None: the model reads bytes.

    state: "tokenizer" in it is the run's tokenizer.json as a string, or None; None: a new run.
    """
    given = None if options.tokenizer is None else open_tokenizer(options.tokenizer)
    if state is None:
        return given
    if state["tokenizer"] is None:
        if given is not None:
            raise SystemExit(
                f"--tokenizer {options.tokenizer}: the run in {options.out} reads bytes: go on "
                "without --tokenizer, or begin another --out"
            )
        return None
    from tokenizers import Tokenizer

    kept = Tokenizer.from_str(state["tokenizer"])
    if given is not None and not same(given, kept):
        raise SystemExit(
            f"--tokenizer {options.tokenizer}: differs from the tokenizer of the run, "
            f"{options.out / TOKENIZER}: go on without --tokenizer, or begin another --out"
        )
    return kept


class Text:
    """What is trained on and validated on, as the model reads it: bytes, or tokens of them."""

    def __init__(self, options: argparse.Namespace, tokenizer: Any) -> None:
        self.train: Tokens
        self.held_out: Tokens
        self.train, self.held_out = parts = read(options.data, options.split)
        self.tokenizer = tokenizer
        self.num_tokens = 256
        if tokenizer is not None:
            # The greatest id, as there may be gaps below it.
            self.num_tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
            name = str(options.data)
            self.train, self.held_out = (tokenized(part, tokenizer, name) for part in parts)
        unit = "bytes" if tokenizer is None else "tokens"
        check_lengths((self.train, self.held_out), options.data, options.length, unit)
        self.split = [len(part) for part in parts]
        # Means of each part. A loss per token, divided by them, is one per byte.
        self.train_bytes_per_token = len(parts[0]) / len(self.train)
        self.held_out_bytes_per_token = len(parts[1]) / len(self.held_out)


def nats(model: Any, ids: Tensor, options: argparse.Namespace) -> Tensor:
    """The sum of the next-token cross-entropies of ids (B, T + 1)."""
    low = options.dtype == "bfloat16"
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=low):
        logits = model(ids[:, :-1]).flatten(0, 1)
    wide = logits.float() if low else logits
    return F.cross_entropy(wide, ids[:, 1:].flatten(), reduction="sum")


def learning_rate(options: argparse.Namespace, step: int) -> float:
    """Of update ``step``, from 0: linear up, then linear down to zero after the last one."""
    warmup = options.warmup_steps
    if step < warmup:
        return float(options.learning_rate * (step + 1) / warmup)
    return float(options.learning_rate * (1 - (step - warmup + 1) / (options.steps - warmup + 1)))


# ---- The run -------------------------------------------------------------------------------------


class Run:
    """A model in training and its directory."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        state = self.read_state()
        self.text = Text(options, choose_tokenizer(options, state))
        # The weights come from the seed alone, and are the same in every process.
        torch.manual_seed(options.seed)
        wide = torch.float64 if options.dtype == "float64" else torch.float32
        self.model = Transformer(
            options.dim,
            num_tokens=self.text.num_tokens,
            depth=options.depth,
            tie_embeddings=options.tie_embeddings,
        ).to(device, wide)
        fuse(self.model)
        self.wrapped = wrap(self.model, options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=(0.9, 0.98))
        self.step = 0
        self.signal = 0  # the first that a process received
        self.elapsed_before = 0.0
        self.begin = time.perf_counter()
        if state is not None:
            self.set_state(state)
        else:
            self.metrics_file.unlink(missing_ok=True)
            self.save_model(same_run=False)  # for those who follow the run

    @property
    def state_file(self) -> Path:
        return Path(self.options.out / "training_state.pt")

    @property
    def metrics_file(self) -> Path:
        return Path(self.options.out / "metrics.jsonl")

    def read_state(self) -> dict[str, Any] | None:
        """The checkpoint, or None: the first process reads it, all get its tokenizer."""
        first = dist.get_rank() == 0
        if first:
            self.options.out.mkdir(parents=True, exist_ok=True)
        (there,) = total(self.device, first and self.state_file.exists())
        if there and not self.options.resume:
            raise SystemExit(f"{self.options.out} holds a run already: pass --resume")
        if not there:
            return None
        state = torch.load(self.state_file, "cpu", weights_only=True) if first else {}
        tokenizer = [state.get("tokenizer")]
        dist.broadcast_object_list(tokenizer, device=self.device)
        return {**state, "tokenizer": tokenizer[0]}

    def set_state(self, state: dict[str, Any]) -> None:
        """To that of read_state(): all processes get their part of what the first has read."""
        # Not set_state_dict: where the model's is empty, it leaves out the model.
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, state.get("model", {}), options=options)
        optimizer = state.get("optimizer", {})
        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=options)
        step, elapsed = total(self.device, state.get("step", 0), state.get("elapsed", 0.0))
        self.step, self.elapsed_before = int(step), elapsed
        say(f"going on after step {self.step}")

    def save(self) -> None:
        """All processes gather, the first writes; a crash leaves the former checkpoint or this."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        tokenizer = self.text.tokenizer
        if dist.get_rank() == 0:
            state = {
                "model": model,
                "optimizer": optimizer,
                "step": self.step,
                "elapsed": self.elapsed(),
                "tokenizer": None if tokenizer is None else tokenizer.to_str(),
            }
            temporary = self.state_file.with_suffix(".tmp")
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.state_file)
            if tokenizer is not None:
                tokenizer.save(str(temporary))
                temporary.replace(self.options.out / TOKENIZER)
        self.save_model()

    def save_model(self, same_run: bool = True) -> None:
        if self.options.shard or dist.get_rank() == 0:
            training = described(self.options, self.text.split)
            training |= {"dtype": self.options.dtype}
            if self.text.tokenizer is not None:
                training["bytes_per_token"] = self.text.train_bytes_per_token
            out = self.options.out
            checkpoint.save(self.model, out, overwrite=True, training=training, same_run=same_run)

    def elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.begin

    def ids(self, windows: Tokens) -> Tensor:
        return torch.from_numpy(windows).to(self.device, torch.int64)

    def update(self) -> dict[str, float]:
        options, rank, processes = self.options, dist.get_rank(), dist.get_world_size()
        start = time.perf_counter()
        rows = options.batch // processes
        mine = range(rank * rows, (rank + 1) * rows)
        ids = self.ids(batch_at(self.text.train, self.step, mine, options.length, options.seed))
        loss = nats(self.wrapped, ids, options) / (rows * options.length)
        loss.backward()
        # A signal to one process stops all after the same step.
        sent = [0] * processes
        sent[rank] = received[0]
        mean, *signals = total(self.device, loss.item() / processes, *sent)
        self.signal = int(next(filter(None, signals), 0))
        norm: Any = clip_grad_norm_(self.model.parameters(), options.clip)
        rate = learning_rate(options, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.step += 1
        if not math.isfinite(mean):
            raise SystemExit(
                f"the loss is not finite at step {self.step}: try a lower learning rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "step": self.step,
            "train_bits_per_byte": mean / math.log(2) / self.text.train_bytes_per_token,
            "learning_rate": rate,
            "gradient_norm": float(norm.full_tensor() if options.shard else norm),
            "tokens_per_second": options.batch * options.length / (time.perf_counter() - start),
        }

    @torch.no_grad()
    def validate(self, count: int) -> float:
        """Bits per byte of so many windows, of which each process reads its part."""
        whole = windows(self.text.held_out, count, self.options.length)
        # 64 windows at a time: the logits of more would fill the memory. Shards are gathered for a
        # process without windows too.
        passes = -(-len(whole) // (64 * dist.get_world_size()))
        parts = torch.tensor_split(self.ids(whole), passes * dist.get_world_size())
        mine = parts[dist.get_rank() :: dist.get_world_size()]
        found = sum(float(nats(self.wrapped, part, self.options)) for part in mine)
        predicted = (whole.size - len(whole)) * self.text.held_out_bytes_per_token  # in bytes
        return total(self.device, found)[0] / predicted / math.log(2)


class Log:
    """DIR/metrics.jsonl, up to the step that the run goes on from; of the first process."""

    def __init__(self, run: Run) -> None:
        path = run.metrics_file
        kept = []
        if run.step > 0:
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines[: run.step] if json.loads(line)["step"] <= run.step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def append(self, metrics: dict[str, float]) -> None:
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()


def train(run: Run) -> None:
    options, log = run.options, Log(run) if dist.get_rank() == 0 else None
    while run.step < options.steps and not run.signal:
        metrics = run.update()
        last = run.step == options.steps
        if last or run.step % options.validate_every == 0:
            metrics["validation_bits_per_byte"] = run.validate(options.validation_windows)
            say(f"step {run.step}  {metrics['validation_bits_per_byte']:.4f} bits/byte")
        if last:
            run.save_model()  # before what takes longest
            metrics["final_validation_bits_per_byte"] = run.validate(4096)
        metrics["elapsed_seconds"] = run.elapsed()
        if log:
            log.append(metrics)
        if last or run.signal or run.step % options.checkpoint_every == 0:
            run.save()


def leave(status: int) -> NoReturn:
    """Ends the process as it is.

    Gloo's threads may hold tensors while DistributedDataParallel's last reference to the group is
    dropped. The drop then waits for them for ever (github.com/pytorch/pytorch/pull/179291).
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed from the start
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def main() -> NoReturn:
    device = join()
    run = Run(parse(), device)
    record_signals()
    train(run)
    stopped = run.step < run.options.steps
    say(f"{'stopped' if stopped else 'ended'} after step {run.step}: {run.options.out}")
    leave(128 + run.signal if stopped else 0)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        leave(end.code if isinstance(end.code, int) else 1)
    except Exception:
        traceback.print_exc()
        leave(1)
