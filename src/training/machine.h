#pragma once

#include "model/machine.h"

namespace gateloop::training {

using model::available_memory;
using model::usable_cpus;

}  // namespace gateloop::training
