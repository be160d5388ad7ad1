# One layer of the simplified, real GateLoop on a long sequence.
import torch

from gateloop_cpp import SimpleGateLoopLayer

gate_loop = SimpleGateLoopLayer(512)

x = torch.randn(1, 65536, 512)
x = gate_loop(x) + x
print(x.shape)  # torch.Size([1, 65536, 512])
