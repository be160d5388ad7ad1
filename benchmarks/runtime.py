"""The runtime as a contender, through its C API: every format, one sequence or many."""

import ctypes
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contenders import AbsentError

FORMATS = {"float32": 1, "bfloat16": 2, "float16": 3, "int8": 4}  # gateloop_format
Logits = ctypes.POINTER(ctypes.c_float)


def library() -> Any:
    """libgateloop_runtime.so, beside the operators' library."""
    file = Path(os.environ["GATELOOP_OPS_LIBRARY"]).with_name("libgateloop_runtime.so")
    if not file.exists():
        raise AbsentError("the runtime's library is not built")
    found = ctypes.CDLL(str(file))
    found.gateloop_last_error.restype = ctypes.c_char_p
    found.gateloop_model_num_tokens.restype = ctypes.c_int64
    return found


class Session:
    """A model of a folder in one format; as many threads as torch uses."""

    def __init__(self, library: Any, folder: Path, dtype: str) -> None:
        self.library = library
        model, self.session = ctypes.c_void_p(), ctypes.c_void_p()
        path = str(folder).encode()
        self.check(library.gateloop_model_open(path, 0, FORMATS[dtype], ctypes.byref(model)))
        threads = torch.get_num_threads()
        try:
            self.check(library.gateloop_session_new(model, threads, ctypes.byref(self.session)))
            self.num_tokens = library.gateloop_model_num_tokens(model)
        finally:
            library.gateloop_model_free(model)  # the session keeps what it needs
        weakref.finalize(self, library.gateloop_session_free, self.session)

    def check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(self.library.gateloop_last_error().decode())

    def read(self, ids: Tensor) -> Tensor:
        """The likeliest tokens (B, 1) after ids (B, T)."""
        batch, time = ids.shape
        logits, data = Logits(), ctypes.c_void_p(ids.data_ptr())
        sizes = ctypes.c_int64(batch), ctypes.c_int64(time)
        self.check(self.library.gateloop_prefill(self.session, data, *sizes, ctypes.byref(logits)))
        numbers = np.ctypeslib.as_array(logits, (batch, self.num_tokens))
        return torch.from_numpy(numbers).argmax(-1, keepdim=True)

    def generate(self, prompt: Tensor, length: int) -> Tensor:
        """The likeliest tokens (B, length) after a prompt (B, T)."""
        self.check(self.library.gateloop_session_set_state(self.session, None))
        text = [self.read(prompt.contiguous())]
        while len(text) < length:
            text.append(self.read(text[-1]))
        return torch.cat(text, 1)
