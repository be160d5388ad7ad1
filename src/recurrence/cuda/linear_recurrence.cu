// h_t = a_t h_{t-1} + x_t and its adjoint, real and complex.
#include "recurrence/cuda/launch.cuh"
#include "recurrence/cuda/linear_recurrence-inl.h"

namespace gateloop::recurrence::cuda {

std::size_t scratch_bytes(const LinearRecurrence& p) { return scan_scratch_bytes(p); }
std::size_t scratch_bytes(const LinearRecurrenceBackward& p) { return scan_scratch_bytes(p); }

void run(const LinearRecurrence& p, const Context& context) {
  run_scan("LinearRecurrence", p, context);
}
void run(const LinearRecurrenceBackward& p, const Context& context) {
  run_scan("LinearRecurrenceBackward", p, context);
}

}  // namespace gateloop::recurrence::cuda
