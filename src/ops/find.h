#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace gateloop::ops {

/// The operator `name`, which has the signature Function.
template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace gateloop::ops
