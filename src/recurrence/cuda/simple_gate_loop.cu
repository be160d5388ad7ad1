// The simple gate loop and its adjoint.
#include "recurrence/cuda/launch.cuh"
#include "recurrence/cuda/simple_gate_loop-inl.h"

namespace gateloop::recurrence::cuda {

std::size_t scratch_bytes(const SimpleGateLoop& p) { return scan_scratch_bytes(p); }
std::size_t scratch_bytes(const SimpleGateLoopBackward& p) { return scan_scratch_bytes(p); }

void run(const SimpleGateLoop& p, const Context& context) {
  run_scan("SimpleGateLoop", p, context);
}
void run(const SimpleGateLoopBackward& p, const Context& context) {
  run_scan("SimpleGateLoopBackward", p, context);
}

}  // namespace gateloop::recurrence::cuda
