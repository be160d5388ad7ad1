# A GateLoop Transformer over bytes: ids in, logits out; then more bytes, at a constant cost each.
import torch

from gateloop_cpp import Transformer

model = Transformer(num_tokens=256, dim=624, depth=6)

ids = torch.randint(0, 256, (1, 1024))
logits = model(ids)
print(logits.shape)  # torch.Size([1, 1024, 256])

print(model.generate(ids, length=16).shape)  # torch.Size([1, 16])
