#include "training/machine.h"

#include <algorithm>

#include "gateloop/training.h"

namespace gateloop::training {

int default_threads() { return std::min(torch::get_num_threads(), usable_cpus()); }

}  // namespace gateloop::training
