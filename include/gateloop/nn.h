#pragma once

/// The modules of GateLoop: everything under gateloop::nn.
#include "gateloop/nn/causal_full_attention.h"
#include "gateloop/nn/feed_forward.h"
#include "gateloop/nn/gate_looped_attention.h"
#include "gateloop/nn/mixer.h"
#include "gateloop/nn/rms_norm.h"
#include "gateloop/nn/runtime_model.h"
#include "gateloop/nn/simple_gate_loop_layer.h"
#include "gateloop/nn/transformer.h"
