"""Head to head: which mixer gives the fewest bits per byte at equal parameters?

Question: The mixers are GateLoop, attention with rotary positions, GateLoop with one layer of local
attention, and a simple gate loop in front of GateLoop and of attention. Trained on windows of 256
bytes, which is best? Which gains at test time from windows longer than that, of 1,024 and 4,096
bytes?

Method: Six layers of width 128 and the training of ``experiments/base.py``. Widths of heads are set
so that parameters agree within 2 per cent; depth 5 instead of 6 pays for the simple gate loops.
Test windows start from nothing and predict the same bytes.

Command: make experiments ARGS=head_to_head DATA=FILE
"""

from experiments import base
from experiments.frame import Variant
from experiments.language import WINDOWS

ATTENTION = "--rotary-emb --heads 4"


EXPERIMENT = base.experiment(
    name="head_to_head",
    document=__doc__ or "",
    windows=WINDOWS,
    variants=(
        Variant("gate_loop", "", "GateLoop"),
        Variant(
            "hybrid",
            f"--layers gate_loop*5,attention {ATTENTION} --dim-head 36 --window 64",
            "GateLoop, the last layer attention over 64 bytes",
        ),
        Variant(
            "attention",
            f"--layers attention {ATTENTION} --dim-head 38",
            "attention, rotary",
        ),
        Variant(
            "simple_gate_loop",
            "--depth 5 --simple-gate-loop every",
            "simple gate loop in front of GateLoop",
        ),
        Variant(
            "simple_attention",
            f"--layers attention {ATTENTION} --dim-head 36 --depth 5 --simple-gate-loop every",
            "simple gate loop in front of attention, rotary",
        ),
    ),
)
