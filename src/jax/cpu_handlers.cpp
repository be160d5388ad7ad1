// The handlers that XLA calls on the CPU, on threads of its pool.
#include <xla/ffi/api/ffi.h>

#include "gateloop/recurrence.h"
#include "host/output_memory.h"
#include "jax/host.h"
#include "jax/operations.h"

namespace gateloop::jax {
namespace {

template <class Params>
void execute(const Kernel<Params>& kernel, const recurrence::Executor& executor) {
  for (const Memory& memory : kernel.fresh) {
    host::ready_output(memory.data, memory.bytes, kernel.params.shape.batch, executor);
  }
  run(kernel.params, executor);
}

template <class Params, class Options, class... Buffers>
auto on_cpu(const char* name, Kernel<Params> (*operation)(Options, Buffers...)) {
  return [=](ffi::ThreadPool pool, bool first, bool second, Buffers... buffers) {
    return guarded(name, [&] {
      execute(operation({first, second}, buffers...), executor_of(pool));
    });
  };
}

auto platform() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace

#define GATELOOP_JAX_HANDLER(operation)                                                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(gateloop_jax_##operation, on_cpu(#operation, operation), \
                                bound(platform(), operation))

#pragma GCC visibility push(default)
GATELOOP_JAX_HANDLER(linear_recurrence);
GATELOOP_JAX_HANDLER(linear_recurrence_backward);
GATELOOP_JAX_HANDLER(polar_gate_loop);
GATELOOP_JAX_HANDLER(polar_gate_loop_backward);
GATELOOP_JAX_HANDLER(simple_gate_loop);
GATELOOP_JAX_HANDLER(simple_gate_loop_backward);
GATELOOP_JAX_HANDLER(gate_loop);
GATELOOP_JAX_HANDLER(gate_loop_backward);
#pragma GCC visibility pop

}  // namespace gateloop::jax
