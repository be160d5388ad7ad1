// The fused GateLoop read, max heads, and its adjoint.
#include "recurrence/cuda/launch.cuh"
#include "recurrence/cuda/polar_gate_loop-inl.h"

namespace gateloop::recurrence::cuda {

std::size_t scratch_bytes(const PolarGateLoop& p) { return scan_scratch_bytes(p); }
std::size_t scratch_bytes(const PolarGateLoopBackward& p) { return scan_scratch_bytes(p); }

void run(const PolarGateLoop& p, const Context& context) { run_scan("PolarGateLoop", p, context); }
void run(const PolarGateLoopBackward& p, const Context& context) {
  run_scan("PolarGateLoopBackward", p, context);
}

}  // namespace gateloop::recurrence::cuda
