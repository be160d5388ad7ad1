"""Our code, its peers and the machine's floors, side by side: `make bench`.

run                                  the command
forms, scaling, gpu                  commands of their own
operators, heads, ragged, layer,
model, generation, memory,
time_sharding, definitions,
problems                             what is measured
contenders                           the types that these are made of
torch_passes, jax_contenders,
peer, program, runtime, floors,
oracle                               the contenders, and the oracle
measure, worker, timing              how: processes, validation, turns
kernels, base                        the C++ benchmark; another revision of ours
environment, records, report, plot   what is kept and shown
"""
